"""What README and docs say to type and to run works: reading shards with other people's packages, links, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipelines.dataset import commit_shard, write_dataset
from data_pipelines.shard import Sample
from launch.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Samples with a picture, with a sound, and with both; the bytes need not be a real picture to be read."""
    folder = tmp_path / "dataset"
    samples = [
        Sample(
            key=f"s-{number}",
            image=b"png" if number % 3 else None,
            text=f"text {number}",
            audio=b"flac" if number % 3 != 1 else None,
            metadata={"label": number, "label_name": str(number)},
            image_extension="png",
            audio_extension="flac",
        )
        for number in range(6)
    ]
    (folder / "shards").mkdir(parents=True)
    write_dataset(folder, "d", [commit_shard(samples, folder, "shards/train-000000.tar")])
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_other_packages_read_the_shards_as_the_docs_say(
    page: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    snippets = [code for code in blocks(ROOT / page, "python") if "webdataset" in code]
    assert snippets
    for code in snippets:
        names: dict[str, Any] = {}
        exec(code.replace("datasets/mine", str(dataset)), names)
        found = list(names["samples"])
        assert len(found) == 6 and {len(str(sample["__key__"])) for sample in found} == {3}
        assert [sample.get("png") for sample in found][:2] == [None, b"png"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_the_docs_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lines = [line for code in blocks(page, "") for line in code.splitlines()]
    lines += [quoted for quoted in re.findall(r"`([^`\n]+)`", text) if quoted.startswith("triptych ")]
    for line in lines:
        line = line.removeprefix("$ ").removeprefix(".venv/bin/")
        if not line.startswith("triptych ") or "|" in line:
            continue
        words = shlex.split(line, comments=True)
        if "..." in words:
            continue
        command = words[1:3] if words[1] == "data" and len(words) > 2 else words[1:2]
        if command and command[0] in PLANNED:
            continue
        shown = CliRunner().invoke(app, [*command, "--help"])
        assert shown.exit_code == 0, line
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            assert option in shown.output, line


def test_every_fault_of_the_table_has_a_test() -> None:
    table = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split("## The table of faults")[1]
    rows = [line for line in table.split("\n\n")[1].splitlines() if line.startswith("|")][2:]
    assert len(rows) > 15
    for row in rows:
        folder, proofs = ROOT, re.findall(r"`((?:tests/\S+/)?(?:test_\w+\.py)?)`", row)
        assert any(proofs), row
        for proof in filter(None, proofs):
            folder = (ROOT / proof).parent if "/" in proof else folder
            assert (ROOT / proof if "/" in proof else folder / proof).exists(), proof


# Named under "Planned, not there" in docs/design.md.
PLANNED = ("finetune",)
