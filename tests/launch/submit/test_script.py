"""Names and values of a config, a site profile and the command line: refused, or the same to sbatch and to bash.

The scripts that come out are run by a real bash, with programs in PATH that write down how they were called; a canary
that any field might set off must stay away.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_pipelines.config import BuildConfig
from data_pipelines.errors import BadInput
from launch.submit.chain import Chain, Script, Wanted
from launch.submit.request import Asked, merge
from launch.submit.script import TEMPLATES, directive, scratch, template
from launch.submit.site import Site
from pretrain.config import Config, load_config
from pretrain.slurm_config import SlurmConfig

RECORDER = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" $'\\n' >> "$RECORD"
case "${0##*/} $1" in "scontrol show") echo node1; echo node2 ;; esac
"""
CANARY = "canary"
NASTY = [
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"; touch {CANARY} #",
    f"' ; touch {CANARY} ; '",
    f'" ; touch {CANARY} ; "',
    f"\ntouch {CANARY}\n",
    f"\r\n#SBATCH --wrap=touch {CANARY}\n",
    f"x && touch {CANARY}",
    f"<(touch {CANARY})",
    f"${{HOME:-$(touch {CANARY})}}",
    f"| touch {CANARY}",
    "--wrap=id",
    "\\",
    "%j",
    "$HOME",
    "a b",
    "\u2028",
    "\x1b[31m",
    "",
]
# Around each of them, what would make it pass for a harmless value.
ANY = st.one_of(
    st.sampled_from(NASTY),
    st.text(max_size=12),
    st.lists(st.one_of(st.sampled_from(NASTY), st.sampled_from(["gpu", "/a/b", "1", ":"])), max_size=3).map("".join),
)
ASKED = ("partition", "account", "qos", "constraint", "time", "mem", "job_name", "dependency")
SITES: dict[str, Any] = {
    "reservation": lambda text: {"reservation": text},
    "exclude": lambda text: {"exclude": text},
    "gpu_type": lambda text: {"gpu_type": text, "gpus_per_node": 2},
    "source": lambda text: {"source": [text]},
    "modules": lambda text: {"modules": [text]},
    "venv": lambda text: {"venv": text},
    "python": lambda text: {"python": text},
    "scratch": lambda text: {"scratch": text},
    "image": lambda text: {"container": {"runtime": "apptainer", "image": text}},
    "mount": lambda text: {"container": {"runtime": "singularity", "image": "i", "mounts": [text]}},
    "option": lambda text: {"container": {"runtime": "pyxis", "image": "i", "options": [text]}},
    "pyxis": lambda text: {"container": {"runtime": "pyxis", "image": text, "mounts": ["/data"]}},
    "variable": lambda text: {"variables": {text: "value"}},
    "value": lambda text: {"variables": {"NCCL_DEBUG": text}},
    "export": lambda text: {"export": [text]},
    "sbatch name": lambda text: {"sbatch": {text: "x"}},
    "sbatch value": lambda text: {"sbatch": {"comment": text}},
}
RUNS = ("run.dir", "export", "build", "argument")


@dataclass
class Bench:
    """A folder with programs that write down how they are called."""

    folder: Path
    config: Config

    @property
    def canary(self) -> Path:
        return self.folder / CANARY

    def run(self, script: Script) -> list[list[str]]:
        """Run a job's script as a node would, and return the calls that it made."""
        record = self.folder / "record"
        record.write_bytes(b"")
        environment = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "RECORD": str(record),
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "2",
        }
        subprocess.run(
            ["bash", "-s"],
            input=script.text,
            text=True,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            timeout=60,
        )
        calls = record.read_bytes().split(b"\0\n\0")
        return [[word.decode() for word in call.split(b"\0")] for call in calls if call]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "bin").mkdir()
    for name in ("srun", "scontrol", "python", "apptainer", "singularity", "module"):
        program = folder / "bin" / name
        program.write_text(RECORDER)
        program.chmod(0o755)
    (folder / "c.yaml").write_text("run: {dir: runs/x}\ndata: {train: t, eval: t, global_batch: 8}\n")
    before = Path.cwd()
    os.chdir(folder)
    os.environ["TRIPTYCH_PYTHON"] = "python"
    yield Bench(folder, load_config("c.yaml"))
    os.chdir(before)
    del os.environ["TRIPTYCH_PYTHON"]


def scripts_of(
    bench: Bench, asked: dict[str, Any], site: dict[str, Any], run: dict[str, str] | None = None
) -> list[Script]:
    """Every script of a submission, or `BadInput`."""
    run = run or {}
    config = bench.config.model_copy(deep=True)
    if "run.dir" in run:
        config.run.dir = run["run.dir"]
    try:
        profile = Site.model_validate(site)
    except ValueError as error:
        raise BadInput(str(error)) from error
    request = merge(Asked.of(asked), config.slurm, profile)
    export = Path(run.get("export", "out"))
    arguments = ["--resume", run.get("argument", "auto")]
    chain = Chain(Wanted(config, request, profile, None, arguments, True, True, export))
    builds = chain.build(BuildConfig(source="digits", out=run.get("build", "built")), 4)
    return [*builds, chain.pretrain(), *chain.after_training()]


def check(bench: Bench, scripts: list[Script]) -> list[list[str]]:
    """bash takes every script, none sets off the canary, and none has lines that its template does not have."""
    calls = []
    whole = "\n".join(script.text for script in scripts)
    parsed = subprocess.run(["bash", "-n"], input=whole, text=True, capture_output=True, timeout=60)
    assert parsed.returncode == 0, (parsed.stderr, whole)
    for script in scripts:
        expected = template({"build": "build_shards"}.get(script.kind, script.kind)).splitlines()
        own = [line for line in expected if not line.startswith(("#SBATCH", "# SITE:"))]
        lines = iter(script.text.splitlines())
        assert all(line in lines for line in own), script.text
        assert sum(line.startswith("#SBATCH --export=") for line in script.text.splitlines()) == 1
    for script in (scripts[0], scripts[2]):
        calls += bench.run(script)
    assert not bench.canary.exists()
    return calls


RELAXED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(field=st.sampled_from([*ASKED, *SITES, *RUNS]), text=ANY)
@example(field="job_name", text="x\n#SBATCH --wrap=id")
@example(field="value", text=f"$(touch {CANARY})")
@example(field="python", text=f"$(touch {CANARY})")
@example(field="run.dir", text=f"runs/$(touch {CANARY})")
@example(field="source", text=f"a;touch {CANARY}")
@RELAXED
def test_any_text_in_any_field_is_refused_or_quoted(bench: Bench, field: str, text: str) -> None:
    try:
        if field in ASKED:
            scripts = scripts_of(bench, {field: text}, {})
        elif field in RUNS:
            scripts = scripts_of(bench, {}, {}, {field: text})
        else:
            scripts = scripts_of(bench, {}, SITES[field](text))
    except BadInput as error:
        assert "\n" not in text or str(error)
        return
    assert "\n" not in text and "\r" not in text
    check(bench, scripts)


@pytest.mark.parametrize("field", [*ASKED, *SITES, *RUNS])
def test_line_ends_are_refused_in_every_field(bench: Bench, field: str) -> None:
    text = f"x\ntouch {CANARY}"
    with pytest.raises(BadInput):
        if field in ASKED:
            scripts_of(bench, {field: text}, {})
        elif field in RUNS:
            scripts_of(bench, {}, {}, {field: text})
        else:
            scripts_of(bench, {}, SITES[field](text))


def test_what_is_quoted_arrives_as_it_was(bench: Bench) -> None:
    odd = f"a 'b' \"c\" $(touch {CANARY}) \\ * é"
    site = {
        "variables": {"NCCL_DEBUG": odd},
        "modules": ["cuda/12.4"],
        "container": {"runtime": "apptainer", "image": odd, "mounts": ["/data one"], "options": ["--cleanenv"]},
    }
    calls = check(bench, scripts_of(bench, {"nodes": 2}, site, {"argument": odd}))
    assert ["module", "load", "cuda/12.4"] in calls
    prefix = ["apptainer", "exec", "--bind", "/data one", "--bind", str(bench.folder), "--pwd", str(bench.folder)]
    prefix += ["--cleanenv", odd]
    (srun,) = [call for call in calls if call[0] == "srun"]
    place = srun.index("apptainer")
    assert srun[place : place + len(prefix)] == prefix
    assert srun[1:5] == ["--export=ALL", "--nodes=2", "--ntasks=2", "--nodelist=node1,node2"]
    assert srun[-3:] == ["runs/x/jobs/001/config.yaml", "--resume", odd]
    assert any(
        call[: len(prefix)] == prefix and call[len(prefix) :] == ["python", "-c", "import launch"] for call in calls
    )


def test_pyxis_is_told_by_options_of_srun(bench: Bench) -> None:
    site = {"container": {"runtime": "pyxis", "image": "a b", "mounts": ["/data", "/x:/y"]}}
    calls = check(bench, scripts_of(bench, {}, site))
    here = f"{bench.folder}:{bench.folder}"
    step = [
        "--container-image=a b",
        f"--container-mounts=/data:/data,/x:/y,{here}",
        f"--container-workdir={bench.folder}",
    ]
    sruns = [call for call in calls if call[0] == "srun"]
    assert len(sruns) >= 3 and all([word for word in call if word.startswith("--container")] == step for call in sruns)


def test_every_value_stands_in_its_directive(bench: Bench) -> None:
    asked = {
        "nodes": 4,
        "min_nodes": 2,
        "gpus_per_node": 8,
        "cpus_per_task": 64,
        "mem": "480G",
        "partition": "a,b",
        "account": "my-lab",
        "qos": "long",
        "constraint": "a100&ib",
        "time": "1-12:00:00",
        "job_name": "big.run",
    }
    site = {"gpu_type": "h100", "sbatch": {"exclusive": None, "switches": "1@2:00:00"}, "export": ["NCCL_DEBUG"]}
    scripts = {script.kind: script.text for script in scripts_of(bench, asked, site)}
    found = re.findall(r"^#SBATCH --(.*)", scripts["pretrain"], re.MULTILINE)
    for line in (
        *("nodes=2-4", "gpus-per-node=h100:8", "cpus-per-task=64", "mem=480G", "partition=a,b", "account=my-lab"),
        *("qos=long", "constraint=a100&ib", "time=1-12:00:00", "job-name=big.run", "exclusive", "switches=1@2:00:00"),
        *("signal=B:USR1@180", "requeue", "open-mode=append", "output=runs/x/logs/slurm-%j.log"),
    ):
        assert found.count(line) == 1, (line, found)
    (export,) = [line for line in found if line.startswith("export=")]
    assert export.endswith(",NCCL_DEBUG") and "HF_TOKEN," not in export and "ALL" not in export
    assert "export TRIPTYCH_MIN_NODES=2\n" in scripts["pretrain"]
    assert "#SBATCH --gpus-per-node=h100:1\n" in scripts["eval"] and "#SBATCH --cpus-per-task=8\n" in scripts["eval"]
    assert "gpus" not in scripts["build"]


def test_paths_with_percent_and_blanks_in_output() -> None:
    assert directive("output", "a b/%j.log") == '#SBATCH --output="a b/%j.log"'
    assert directive("exclusive", None) == "#SBATCH --exclusive"
    with pytest.raises(BadInput, match="quotes"):
        directive("output", 'a"b')


def test_only_a_few_variables_are_put_into_scratch() -> None:
    assert scratch("/scratch/$USER/$SLURM_JOB_ID") == '/scratch/"${USER:-}"/"${SLURM_JOB_ID:-}"'
    assert scratch("/s c") == "'/s c'"
    for bad in ("/scratch/$HOMER", "$(id)", "/x/$"):
        with pytest.raises(BadInput, match="only"):
            scratch(bad)


def test_scripts_are_in_the_package() -> None:
    root = Path(__file__).resolve().parents[3]
    assert TEMPLATES.resolve() == root / "slurm"
    assert {path.stem for path in TEMPLATES.glob("*.sbatch")} == {"build_shards", "pretrain", "eval", "export"}


def test_the_runs_own_section_is_checked_too() -> None:
    for field in ("partition", "account", "qos", "constraint", "job_name", "time", "mem"):
        with pytest.raises(ValueError, match="is no"):
            SlurmConfig.model_validate({field: "x\n$(id)"})
