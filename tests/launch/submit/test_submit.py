"""`triptych submit` up to sbatch: what it asks for, what it refuses, and what it keeps to itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from data_pipelines.errors import BadInput
from launch.node import main as node_main
from launch.submit import checks, queue
from launch.submit.request import Asked, Request, merge
from launch.submit.site import Site, load_site
from launch.submit_command import submit_command
from pretrain.config import Config, load_config
from pretrain.rank_log import keep_rank_log
from pretrain.slurm_config import SlurmConfig, seconds_of
from tests.ranks import ROOT
from tests.small_run import small_dataset

PROFILES = sorted((ROOT / "slurm" / "sites").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and its data, and no Slurm and no site profile to be found."""
    small_dataset(tmp_path / "data", "small", range(8))
    (tmp_path / "c.yaml").write_text(
        "run: {dir: runs/x}\ndata: {train: data, eval: data, global_batch: 8}\nslurm: {job_name: mine}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.delenv("TRIPTYCH_PYTHON", raising=False)
    return tmp_path


def request(asked: dict[str, Any], config: dict[str, Any], site: dict[str, Any]) -> Request:
    return merge(Asked.of(asked), SlurmConfig.model_validate(config), Site.model_validate(site))


def test_a_dry_run_prints_the_script_and_leaves_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    submit_command(Path("c.yaml"), nodes=2, dry_run=True)
    said = capsys.readouterr()
    assert said.out.startswith("#!/bin/bash\n") and "\nset -- runs/x/jobs/001/config.yaml --resume auto\n" in said.out
    assert "#SBATCH --nodes=2\n" in said.out and "#SBATCH --job-name=mine\n" in said.out
    assert "#SBATCH --export=HOME,USER,PATH," in said.out and "HF_TOKEN," not in said.out
    assert sorted(folder.rglob("*")) == before


def test_without_slurm_it_says_what_to_do(folder: Path) -> None:
    with pytest.raises(BadInput, match="no sbatch here.*--dry-run"):
        submit_command(Path("c.yaml"))
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "options, says",
    [
        ({"nodes": 3}, "data.global_batch 8 do not fit 3 ranks"),
        ({"nodes": 2, "min_nodes": 3}, "min-nodes 3 is more than nodes 2"),
        ({"partition": "a\nb"}, "--partition: 'a\\\\nb' is no name"),
        ({"time": "soon"}, "--time: 'soon' is no time limit"),
        ({"nodes": 0}, "--nodes: Input should be greater than 0"),
        ({"dependency": "after me"}, "is no dependency"),
        ({"nproc": 2, "gpus_per_node": 8}, "one process for each of the 8"),
        ({"resume": "nowhere"}, "--resume nowhere: no such checkpoint"),
        ({"site": Path("none.yaml")}, "--site none.yaml: no such file"),
        ({"set": ["data.train=nowhere"]}, "nowhere"),
        ({"set": ["slurm.signal_seconds=900"], "time": "10"}, "would be told to save 900 s before its end"),
    ],
)
def test_what_cannot_work_is_refused(
    folder: Path, options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "check_client", lambda: None)
    with pytest.raises(BadInput, match=says):
        submit_command(Path("c.yaml"), **options)
    assert not (folder / "runs").exists()


def test_what_plan_rejects_is_refused_and_a_dry_run_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Nothing but memory is wrong: a hundred megabytes and more of activations for each of 1,024 samples.
    (folder / "site.yaml").write_text("accelerator: a100-40g\ngpus_per_node: 1\n")
    options: dict[str, Any] = {"site": Path("site.yaml"), "set": ["model.preset=base", "data.global_batch=1024"]}
    with pytest.raises(typer.Exit) as ended:
        submit_command(Path("c.yaml"), dry_run=True, **options)
    said = capsys.readouterr()
    assert ended.value.exit_code == 2
    assert said.out.startswith("#!/bin/bash\n") and "nothing is submitted" not in said.err
    refused = [line for line in said.err.splitlines() if line.startswith("would be refused: ")]
    found = [line for line in refused if "a rank takes" in line and "of the 40.0 GB of a100-40g" in line]
    assert len(found) == 1 and "use data.micro_batch " in found[0]
    assert not (folder / "runs").exists()


def test_options_win_over_the_config_and_that_over_the_site() -> None:
    site = {"partition": "site", "account": "site", "qos": "site", "time": "3:00:00", "nodes": 8, "gpus_per_node": 4}
    found = request({"partition": "asked"}, {"partition": "config", "account": "config"}, site)
    assert (found.partition, found.account, found.qos) == ("asked", "config", "site")
    assert (found.time, found.nodes, found.world) == ("3:00:00", 8, 32)
    assert request({}, {"time": "5:00:00"}, site).time == "5:00:00"
    assert request({"gpus_per_node": 0}, {}, site).world == 8
    plain = request({}, {}, {})
    assert (plain.time, plain.nodes, plain.world, plain.max_requeues) == ("24:00:00", 1, 1, 100)


def test_a_short_job_is_told_to_save_in_its_last_quarter() -> None:
    for limit, seconds in (("24:00:00", 180), ("12", 180), ("4", 60), ("2", 30), ("0:30", 10)):
        assert request({"time": limit}, {}, {}).signal_seconds == seconds, limit
    assert request({"time": "4"}, {"signal_seconds": 20}, {"signal_seconds": 30}).signal_seconds == 20


def test_time_limits_are_read_as_slurm_reads_them() -> None:
    for text, seconds in (
        ("90", 5400),
        ("2:30", 150),
        ("1:02:03", 3723),
        ("2-12", 216_000),
        ("1-02:30", 95_400),
        ("1-00:00:01", 86_401),
    ):
        assert seconds_of(text) == seconds, text


def test_the_profiles_of_the_docs_are_good(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [path.stem for path in PROFILES] == ["cluster-64", "laptop", "node-8"]
    for path in PROFILES:
        site, _ = load_site(path)
        batch = merge(Asked(), SlurmConfig(), site).world
        submit_command(Path("c.yaml"), site=path, dry_run=True, set=[f"data.global_batch={batch}"])
        said = capsys.readouterr().out
        assert f"with {path}." in said and f"#SBATCH --nodes={site.nodes}\n" in said


def test_the_users_own_profile_is_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = folder / "settings" / "triptych" / "site.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("partition: mine\nvariables: {NCCL_SOCKET_IFNAME: ib0}\n")
    submit_command(Path("c.yaml"), dry_run=True)
    said = capsys.readouterr().out
    assert "#SBATCH --partition=mine\n" in said and "\nexport NCCL_SOCKET_IFNAME=ib0\n" in said


@pytest.mark.parametrize(
    "text, says",
    [
        ("partion: x", "unknown key partion; did you mean partition"),
        ("variables: {HF_TOKEN: hf_abc}", "HF_TOKEN looks like a secret"),
        ("variables: {WANDB_API_KEY: abc}", "WANDB_API_KEY looks like a secret"),
        ("export: [MY_SECRET]", "MY_SECRET looks like a secret"),
        ("export: [ALL]", "is no name of a variable"),
        ("sbatch: {export: ALL}", "export is set by the submission itself"),
        ("sbatch: {output: x}", "output is set by the submission itself"),
        ("{venv: /a, python: /b}", "give one"),
        ("container: {runtime: docker, image: x}", "container.runtime"),
        ('source: ["a\\nb"]', "line end"),
    ],
)
def test_a_wrong_profile_is_named_with_its_line(folder: Path, text: str, says: str) -> None:
    (folder / "site.yaml").write_text(text + "\n")
    with pytest.raises(BadInput, match=says) as caught:
        load_site(folder / "site.yaml")
    assert str(caught.value).startswith(str(folder / "site.yaml")) and "\n" not in str(caught.value)


def test_secrets_of_the_shell_stay_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "MY_SECRET", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"value_of_{name}")
    monkeypatch.setenv("SBATCH_EXPORT", "ALL")
    monkeypatch.setenv("SBATCH_PARTITION", "theirs")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    found = queue.client_environment(["HOME", "NCCL_DEBUG"], ["nodes"])
    assert not [name for name in found if "value_of" in found[name] or name.startswith("SLURM_CPUS")]
    assert "SBATCH_EXPORT" not in found and found["SBATCH_PARTITION"] == "theirs"
    assert "SBATCH_PARTITION" not in queue.client_environment([], ["partition"])
    with pytest.raises(BadInput, match="the value of MY_SECRET would stand in the job's files"):
        submit_command(Path("c.yaml"), dry_run=True, set=["run.name=value_of_MY_SECRET"])
    checks.refuse_secrets(["short abc"], {"API_TOKEN": "abc", "HF_TOKEN_PATH": "short abc"})


def test_job_json_grows_and_a_broken_one_is_no_reason_to_stop(tmp_path: Path) -> None:
    assert queue.read_jobs(tmp_path) == []
    (tmp_path / "job.json").write_text("{")
    queue.note_job(tmp_path, 11, "build", "b", tmp_path / "b.sbatch", {"nodes": 1})
    queue.note_job(tmp_path, 12, "pretrain", "p", tmp_path / "p.sbatch", {"nodes": 2})
    jobs = json.loads((tmp_path / "job.json").read_text())["jobs"]
    assert [(job["id"], job["kind"], job["name"]) for job in jobs] == [(11, "build", "b"), (12, "pretrain", "p")]
    assert all(isinstance(job["submitted"], float) for job in jobs)


def test_with_fewer_nodes_as_many_are_used_as_the_batch_divides_by(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bounds, per_node, status, nodes in (
        ("1-4", 1, 0, "4"),
        ("1-3", 1, 0, "2"),
        ("1-3", 2, 0, "2"),
        ("3-3", 1, 2, ""),
    ):
        assert node_main(["--usable-nodes", bounds, str(per_node), "c.yaml"]) == status
        said = capsys.readouterr()
        assert said.out.strip() == nodes
    assert "divides by no number of nodes from 3 to 3" in said.err
    config: Config = load_config("c.yaml", ["data.micro_batch=4"])
    assert checks.problems(config, request({"nodes": 4}, {}, {}), None, False)[0]
    assert not checks.problems(config, request({"nodes": 4, "min_nodes": 1}, {}, {}), None, False)[0]


def test_a_rank_keeps_its_own_log_over_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    real = sys.stdout, sys.stderr
    for start in (1, 2):
        sys.stdout, sys.stderr = real
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start - 1))
        keep_rank_log(tmp_path, 3, start)
        print("half", end="")
        print(" a line\rwhole", file=sys.stdout)
        print("an error", file=sys.stderr)
    sys.stdout, sys.stderr = real
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "logs" / "rank-3.log").read_text().splitlines()]
    assert lines[0].startswith("== start 1 of the run, on ") and lines[0].endswith("job 7, requeued 0 times")
    assert lines[1:3] == ["whole", "an error"] and lines[3].endswith("job 7, requeued 1 times") and len(lines) == 6
    assert capsys.readouterr().err == "an error\nan error\n"
