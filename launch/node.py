"""One node of a run on several: `slurm/pretrain.sbatch` starts this on each.

`python -m launch.node ARGS` takes the arguments of `accelerate launch ARGS`, which end in `-m pretrain.train CONFIG
[OPTIONS]`, and supervises the ranks of this node. On several nodes the job starts again as a whole, and asks first:
`python -m launch.node --may-restart CONFIG [OPTIONS]` ends with 0 where the config's supervisor settings allow it after
the job's last fault, and with 1 and the reason where not. `python -m launch.node --usable-nodes MIN-MAX PER_NODE CONFIG
[OPTIONS]` prints how many of MAX nodes to use where the job may do with fewer.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import BadInput
from launch.doctor import check_before_start
from launch.doctor.machine import check_port
from launch.incident import Log, say
from launch.ranks import BAD_INPUT, DONE, FAULT, STOPPED_BY_FILE
from launch.supervisor import Job, seconds_before_restart, supervise
from launch.train_command import ACCELERATE_CONFIGS, rank_environment
from pretrain.config import Config, load_config

PROGRAM = "pretrain.train"


def main(arguments: Sequence[str] | None = None) -> int:
    """Supervise this node's ranks, or say whether the job may start again; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    node = 0
    try:
        if words[:1] == ["--may-restart"]:
            return _may_restart(_config(words[1:]))
        if words[:1] == ["--usable-nodes"]:
            print(_usable_nodes(_config(words[3:]), *words[1:3]))
            return DONE
        if PROGRAM not in words:
            raise BadInput(f"the arguments must end in -m {PROGRAM} CONFIG")
        place = words.index(PROGRAM)
        node, num_nodes, num_processes, port = _shape(words[: place - 1])
        config = _config(words[place + 1 :])
        per_node = num_processes // num_nodes
        if not any(word.partition("=")[0] == "--config_file" for word in words[:place]):
            # accelerate's own settings of this user must not leak in.
            words = ["--config_file", str(ACCELERATE_CONFIGS / "multi-node.yaml"), *words]
            place += 2
        if node == 0:
            check_before_start(config, per_node)
            if port:
                check_port(port)
    except BadInput as error:
        if node == 0:
            print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    job = Job(
        command=[sys.executable, "-m", "launch.ranks", *words],
        environment=rank_environment(os.environ, per_node),
        run_dir=Path(config.run.dir),
        resume=_again(words[place + 1 :]),
        ranks=range(node * per_node, (node + 1) * per_node),
        node=node,
        num_nodes=num_nodes,
        stopped_by_file=STOPPED_BY_FILE,
    )
    return supervise(job, config.supervisor)


def _shape(words: Sequence[str]) -> tuple[int, int, int, int]:
    """This node, number of nodes, number of processes over all of them, port."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in (("machine_rank", 0), ("num_machines", 1), ("num_processes", 1), ("main_process_port", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    found, _ = parser.parse_known_args(words)
    if found.num_processes % found.num_machines:
        raise BadInput(f"{found.num_processes} processes do not divide by {found.num_machines} nodes")
    return found.machine_rank, found.num_machines, found.num_processes, found.main_process_port


def _config(words: Sequence[str]) -> Config:
    """The config that the ranks will read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--set", action="append", default=[])
    found, _ = parser.parse_known_args(words)
    if found.config is None:
        raise BadInput(f"{PROGRAM} needs a config file")
    return load_config(found.config, found.set)


def _again(words: Sequence[str]) -> str:
    if "SLURM_JOB_ID" in os.environ:
        return f"sbatch slurm/pretrain.sbatch {shlex.join(words)}  (with the sbatch options of this job)"
    return f"the same command on every node: ... -m {PROGRAM} {shlex.join(words)}"


def _usable_nodes(config: Config, bounds: str, per_node: str) -> int:
    """The most nodes within `MIN-MAX` over whose ranks the batch divides."""
    lowest, _, highest = bounds.partition("-")
    batch = config.data.global_batch
    for num_nodes in range(int(highest), int(lowest) - 1, -1):
        ranks = num_nodes * int(per_node)
        if batch % ranks == 0 and (batch // ranks) % (config.data.micro_batch or 1) == 0:
            if num_nodes < int(highest):
                say(f"{num_nodes} of {highest} nodes are used: data.global_batch {batch} does not divide by more")
            return num_nodes
    raise BadInput(
        f"data.global_batch {batch} (data.micro_batch {config.data.micro_batch}) divides by no number of nodes from "
        f"{lowest} to {highest} with {per_node} ranks each"
    )


def _may_restart(config: Config) -> int:
    steps = Log(Path(config.run.dir)).faults(os.environ.get("SLURM_JOB_ID") or "")
    if not steps:
        say("not started again: no fault of this job is on record")
        return FAULT
    wait = seconds_before_restart(steps, config.supervisor)
    if isinstance(wait, str):
        say(f"not started again: {wait}")
        return FAULT
    say(f"restart {len(steps)} of {config.supervisor.max_restarts}, after the fault in step {steps[-1]}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
