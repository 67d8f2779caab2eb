"""What accelerate was told about things that the run's YAML decides: where the two disagree, nobody wins in silence.

`accelerate launch` hands its config file and its options on in the environment, and there only what was given, but for
the precision, which it always names. The run's YAML is the one place for stage, precision, accumulation, clipping and
offload; accelerate's files need not say them, and ours that do (launch/accelerate/zero-*.yaml) are checked here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.errors import BadInput, printable
from pretrain.config import Config

FIELDS_VARIABLE = "ACCELERATE_CONFIG_DS_FIELDS"
"""Names of what a config file of accelerate's sets about DeepSpeed."""
_PRECISIONS = {"no": "fp32"}


def check_launcher(
    config: Config, accumulation: int, environment: Mapping[str, str], launcher: Sequence[str] = ()
) -> None:
    """Compare what accelerate was told with the run's config.

    Args:
        config: the run.
        accumulation: micro-batches a rank a step that the config comes to.
        environment: this rank's.
        launcher: command line of `accelerate launch`, as `launcher_words` reads it.

    Raises:
        BadInput: naming everything that differs, in one line.
    """
    engine = config.engine
    ours: dict[str, tuple[str, str]] = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": (str(engine.zero_stage), "engine.zero_stage"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (str(accumulation), "data.global_batch / ranks / data.micro_batch"),
        "ACCELERATE_GRADIENT_CLIPPING": (str(config.train.clip_grad_norm), "train.clip_grad_norm"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (
            "cpu" if engine.offload_optimizer else "none",
            "engine.offload_optimizer",
        ),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (
            "cpu" if engine.offload_parameters else "none",
            "engine.offload_parameters",
        ),
        "ACCELERATE_DYNAMO_BACKEND": ("no", "compilation, which is not used"),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none", "a DeepSpeed config of its own, since it is made from the YAML"),
    }
    found = []
    for variable, (mine, name) in ours.items():
        told = environment.get(variable, "").lower()
        if told and told != "auto" and not _equal(told, mine):
            option = variable.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower()
            found.append(f"{option} {printable(environment[variable])}, here it is {mine} ({name})")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    explicit = precision != "no" or "mixed_precision" in environment.get(FIELDS_VARIABLE, "").split(",")
    explicit = explicit or any(word.partition("=")[0] == "--mixed_precision" for word in launcher)
    if explicit and _PRECISIONS.get(precision, precision) != engine.precision:
        found.append(f"mixed_precision {printable(precision)}, here it is {engine.precision} (engine.precision)")
    if found:
        raise BadInput(
            f"accelerate's settings and the run's config disagree: accelerate says {'; '.join(found)}. Change one "
            "of the two: the options or config file of `accelerate launch`, or the config (`--set KEY=VALUE`)"
        )


def launcher_words() -> list[str]:
    """Command line of this process's parent, up to the program that it starts: the options of `accelerate launch`."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return []
    return words[: words.index("pretrain.train")] if "pretrain.train" in words else []


def _equal(told: str, mine: str) -> bool:
    try:
        return float(told) == float(mine)
    except ValueError:
        return told == mine
