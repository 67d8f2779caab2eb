"""Fills in an sbatch file of slurm/: its #SBATCH lines, the lines of the site, and the arguments.

What comes out is the same file that a user would submit by hand, and can be. Two kinds of values go in. Those in
`#SBATCH` lines, which bash takes for comments and sbatch reads by its own rules, passed a pattern that leaves nothing
to interpret. All others are quoted for bash by `shlex.quote`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.errors import BadInput
from launch.submit.request import Request
from launch.submit.site import Container, Site

TEMPLATES = Path(__file__).resolve().parent.parent / "sbatch"
SITE_LINE = "# SITE:"
_DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)(?:=(.*))?$")
_SCRATCH_VARIABLES = re.compile(r"\$\{?(USER|HOME|TMPDIR|SLURM_JOB_ID|SLURM_TMPDIR)\}?(?![A-Za-z0-9_])")
Directives = Mapping[str, str | int | None]
"""Options of sbatch by their long names; None stands alone."""


def template(name: str) -> str:
    """The text of `slurm/NAME.sbatch`."""
    return (TEMPLATES / f"{name}.sbatch").read_text(encoding="utf-8")


def fill(text: str, directives: Directives, lines: Sequence[str], arguments: Sequence[str], made_by: str) -> str:
    """A template with these directives, site lines and arguments in it.

    A directive that the template has is replaced where it stands; others follow its last one.
    """
    left = dict(directives)
    out: list[str] = []
    end_of_directives = 0
    for line in text.splitlines():
        found = _DIRECTIVE.match(line)
        if found and found[1] in left:
            line = directive(found[1], left.pop(found[1]))
        if line.startswith(SITE_LINE):
            out += ["# " + _comment(made_by), *lines, shlex.join(["set", "--", *map(_one_line, arguments)])]
            continue
        out.append(line)
        if found:
            end_of_directives = len(out)
    out[end_of_directives:end_of_directives] = [directive(name, value) for name, value in left.items()]
    return "\n".join(out) + "\n"


def directive(name: str, value: str | int | None) -> str:
    """One `#SBATCH` line."""
    if value is None:
        return f"#SBATCH --{name}"
    text = str(value)
    if not text.isprintable() or '"' in text or "\\" in text:
        raise BadInput(f"{name} {text[:80]!r}: sbatch cannot take quotes, backslashes and control characters there")
    # sbatch takes quotes off as a shell would, and knows no other escape.
    return f"#SBATCH --{name}=" + (f'"{text}"' if re.search(r"[\s#']", text) else text)


def output_name(path: Path | str) -> str:
    """A path as the beginning of sbatch's --output, in which `%` has a meaning."""
    return str(path).replace("%", "%%")


def exported_names(text: str, site: Site) -> list[str]:
    """Names of the variables that a job gets from the shell that submits."""
    names = next(found[2] for line in text.splitlines() if (found := _DIRECTIVE.match(line)) and found[1] == "export")
    return list(dict.fromkeys([*names.split(","), *site.export]))


def site_lines(site: Site, request: Request, python: str, folder: Path, python_path: str | None) -> list[str]:
    """Shell lines that make a node what the job needs.

    Args:
        site: the profile.
        request: what the training asks for.
        python: Python of the job.
        folder: absolute folder of the submission, which a container has to see.
        python_path: PYTHONPATH of the job; None leaves it alone.
    """
    lines = [f"source {_quoted(path)} || exit 2" for path in site.source]
    if site.modules:
        lines.append(
            "type module >/dev/null 2>&1 || for init in /etc/profile.d/*modules.sh /etc/profile.d/*lmod.sh; do "
            '[ -r "$init" ] && source "$init"; done'
        )
        lines.append(f"module load {shlex.join(site.modules)} || exit 2")
    lines += [f"export {name}={_quoted(value)}" for name, value in site.variables.items()]
    if site.venv is not None:
        lines.append(f'export VIRTUAL_ENV={_quoted(site.venv)} PATH={_quoted(site.venv + "/bin")}:"$PATH"')
    if python_path:
        lines.append(f"export PYTHONPATH={_quoted(python_path)}")
    if site.scratch is not None:
        lines.append(f"export TRIPTYCH_CACHE_DIR={scratch(site.scratch)}")
    if site.container is not None:
        lines += container_lines(site.container, request.gpus_per_node > 0, folder)
    lines.append(f"TRIPTYCH_PYTHON={_quoted(python)}")
    return lines


def container_lines(container: Container, has_gpus: bool, folder: Path) -> list[str]:
    """`RUN` or `STEP` of the job."""
    mounts = list(dict.fromkeys([*container.mounts, str(folder)]))
    if container.runtime == "pyxis":
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        step = [f"--container-image={container.image}", f"--container-mounts={pairs}"]
        step += [f"--container-workdir={folder}", *container.options]
        return [f"STEP=({shlex.join(map(_one_line, step))})"]
    run = [container.runtime, "exec"]
    if has_gpus and "--rocm" not in container.options:
        run.append("--nv")
    for mount in mounts:
        run += ["--bind", mount]
    run += ["--pwd", str(folder), *container.options, container.image]
    return [f"RUN=({shlex.join(map(_one_line, run))})"]


def scratch(path: str) -> str:
    """A path for bash in which a few variables are put in on the node, and nothing else is.

    Raises:
        BadInput: it asks for another variable.
    """
    parts, place = [], 0
    for found in _SCRATCH_VARIABLES.finditer(path):
        parts += [_quoted(path[place : found.start()]), f'"${{{found[1]}:-}}"']
        place = found.end()
    parts.append(_quoted(path[place:]))
    if any("$" in part for part in parts[::2]):
        raise BadInput(f"scratch {path}: only $USER, $HOME, $TMPDIR, $SLURM_JOB_ID and $SLURM_TMPDIR are put in")
    return "".join(part for part in parts if part != "''")


def _quoted(text: str) -> str:
    return shlex.quote(_one_line(text))


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise BadInput(f"{text[:80]!r}: line ends and other control characters cannot go into a job script")
    return text


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
