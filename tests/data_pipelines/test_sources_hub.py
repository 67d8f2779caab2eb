"""Names on the Hugging Face Hub: the command, with the real clients, against a Hub on the loopback interface."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.dataset import open_dataset
from tests.data_pipelines.test_sources_huggingface import assert_whole, image, make, sound
from tests.hub_server import SIGNATURE, TOKEN, Hub, Repo, Request, running_hub

pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).resolve().parents[2]
# One process for all commands: to import `datasets` takes longer than most of them.
_CLIENT = """
import json, os, sys
import datasets, huggingface_hub.constants
from typer.testing import CliRunner
from launch.cli import app
for line in sys.stdin:
    arguments, token, offline = json.loads(line)
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = offline
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    done = CliRunner().invoke(app, ["data", "build", *arguments])
    print(json.dumps([done.exit_code, done.output, repr(done.exception)]), flush=True)
"""
_README = b"""---
configs:
- config_name: all
  data_files: data/*.parquet
- config_name: few
  data_files: few/*.parquet
---
"""


@pytest.fixture(scope="module")
def one_hub() -> Iterator[Hub]:
    with running_hub() as running:
        yield running


@pytest.fixture
def hub(one_hub: Hub) -> Hub:
    """Empty again."""
    one_hub.reset()
    return one_hub


@dataclass
class Done:
    status: int
    output: str

    def built(self) -> Done:
        assert self.status == 0, self.output
        return self

    def refused(self, says: str) -> None:
        assert self.status == 2 and says in self.output, self.output
        assert self.output.startswith("error: ") and self.output.count("\n") == 1


Build = Callable[..., Done]


@pytest.fixture(scope="module")
def build(one_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """`triptych data build`, in a process whose Hub is this one. Tests share its caches, and so no names."""
    folder = tmp_path_factory.mktemp("client")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": one_hub.url, "HF_HOME": str(folder / "hf"), "NO_PROXY": "*"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=env,
            cwd=folder,
            text=True,
        )

        def run(*arguments: str | Path, token: str | None = None, offline: bool = False) -> Done:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([[str(argument) for argument in arguments], token, offline]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            shown = (folder / "log").read_text()
            assert answer, shown
            status, output, exception = json.loads(answer)
            for text in (output, exception, shown):
                assert "hf_" not in text.replace("hf_hub", "") and SIGNATURE not in text
            return Done(status, output)

        yield run
        process.kill()
        process.communicate()


def files_of(count: int, first: int = 0) -> dict[str, bytes]:
    """A repository with two configurations: `count` rows in two files, and the first 3 of them."""

    def parquet(rows: Any) -> bytes:
        file = io.BytesIO()
        rows.to_parquet(file)
        return file.getvalue()

    half = count // 2
    return {
        "README.md": _README,
        "data/0.parquet": parquet(make(half, first)),
        "data/1.parquet": parquet(make(count - half, first + half)),
        "few/0.parquet": parquet(make(3, first)),
    }


def test_a_private_dataset_by_configuration_and_revision(hub: Hub, build: Build, tmp_path: Path) -> None:
    repo = Repo(True, {"main": {"README.md": _README}, "v1.0": files_of(11)})
    hub.repos["datasets/lab/birds"] = repo
    few, streamed = tmp_path / "few", tmp_path / "streamed"
    whole = "hf:lab/birds:all@v1.0"
    build(whole, "--out", streamed, "--streaming", "--shard-size", "4", token=TOKEN).built()
    assert_whole(streamed)
    assert {request.byte_range is None for request in hub.asked(r"\.parquet$") if request.method == "GET"} == {False}
    build(whole, "--out", tmp_path / "mapped", "--shard-size", "4", token=TOKEN).built()
    assert open_dataset(tmp_path / "mapped").fingerprint == open_dataset(streamed).fingerprint
    build(f"hf:lab/birds:few@{repo.commit_of('v1.0')}", "--out", few, token=TOKEN).built()
    assert_whole(few, 3)
    recorded = json.loads((few / "build.json").read_text())["source"]
    assert recorded["commit"] == recorded["revision"] == repo.commit_of("v1.0")

    assert {request.token for request in hub.requests if request.server == "hub"} == {TOKEN}
    assert {request.token for request in hub.requests if request.server == "storage"} == {None}
    for path in (path for out in (few, streamed) for path in out.rglob("*") if path.is_file()):
        assert TOKEN.encode() not in path.read_bytes()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_push_in_the_middle_of_a_build_is_not_seen(streaming: bool, hub: Hub, build: Build, tmp_path: Path) -> None:
    pictures = {f"{n}.png": image(n) for n in range(1, 7)}
    table = b"file_name,text\n" + b"".join(b"%d.png,text %d\n" % (n, n) for n in range(1, 7))
    old = {"metadata.csv": table} | pictures
    new = {"metadata.csv": table} | {f"{n}.png": image(n + 20) for n in range(1, 7)}
    name = f"lab/{'streamed' if streaming else 'mapped'}"
    repo = hub.repos[f"datasets/{name}"] = Repo(False, {"main": old, "old": old})

    def push(request: Request) -> None:
        if request.path.endswith("/metadata.csv") and request.method == "GET":
            repo.branches["main"] = new

    hub.on_request = push
    out = tmp_path / "out"
    command = (f"hf:{name}", "--out", out, "--shard-size", "2", *(["--streaming"] if streaming else []))
    build(*command, "--workers", "2" if not streaming else "1").built()
    assert repo.branches["main"] is new

    def assert_old() -> None:
        dataset = open_dataset(out)
        assert [dataset[n].image for n in range(6)] == [image(n) for n in range(1, 7)]

    assert_old()
    (out / open_dataset(out).shards[1].path).unlink()
    assert "missing or damaged; making them again" in build(*command).built().output
    assert_old()
    build(f"hf:{name}@main", *command[1:]).refused("made of other rows")
    other = tmp_path / "other"
    build(f"hf:{name}@main", "--out", other, *command[3:]).built()
    assert open_dataset(other)[0].image == image(21)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_repository_of_sounds_in_pages(streaming: bool, hub: Hub, build: Build, tmp_path: Path) -> None:
    sounds = {f"{('ant', 'bee')[n % 2]}/{n}.wav": sound(n) for n in range(1, 9)}
    name = f"lab/sounds-{streaming}"
    hub.repos[f"datasets/{name}"] = Repo(False, {"main": sounds})
    hub.page_size = 3
    build(f"hf:{name}", "--out", tmp_path / "out", *(["--streaming"] if streaming else [])).built()
    assert hub.asked("/tree/")
    dataset = open_dataset(tmp_path / "out")
    assert [dataset[n].audio for n in range(8)] == [sound(n) for n in (2, 4, 6, 8, 1, 3, 5, 7)]
    assert dataset[0].metadata == {"label": 0, "label_name": "ant"}


def test_the_cache_is_used_where_it_is_known_to_be_right(hub: Hub, build: Build, tmp_path: Path) -> None:
    repo = hub.repos["datasets/lab/kept"] = Repo(False, {"main": files_of(4)})
    commit, out = repo.commit_of("main"), tmp_path / "out"
    build("hf:lab/kept:few", "--out", out).built()
    (out / open_dataset(out).shards[0].path).unlink()
    repo.private = True
    build("hf:lab/kept:few", "--out", out).built()
    assert_whole(out, 3)
    other = ("--out", tmp_path / "other")
    build("hf:lab/kept:few", *other).refused(f"HF_HUB_OFFLINE=1 takes commit {commit} from the cache")
    build("hf:lab/kept:few@v1", *other, token=TOKEN).refused("Revision 'v1' doesn't exist")
    hub.requests.clear()
    build("hf:lab/kept:few@v1", *other, offline=True).refused(f"whether commit {commit} in the cache is 'v1'")
    build(f"hf:lab/kept:few@{commit}", *other, offline=True).built()
    build("hf:lab/kept:few", "--out", tmp_path / "third", offline=True).built()
    assert not hub.requests
    assert_whole(tmp_path / "third", 3)


def test_what_is_not_to_be_had(hub: Hub, build: Build, tmp_path: Path) -> None:
    hub.repos |= {
        "datasets/lab/secret": Repo(True, {"main": files_of(4)}),
        "datasets/lab/open": Repo(False, {"main": files_of(4)}),
        "datasets/lab/empty": Repo(False),
    }
    out = ("--out", tmp_path / "out")
    unknown = "doesn't exist on the Hub or cannot be accessed"
    build("hf:lab/secret:few", *out).refused(
        f"hf:lab/secret: cannot be read (DatasetNotFoundError: Dataset 'lab/secret' {unknown}"
    )
    build("hf:lab/secret:few", *out, token="hf_wrong").refused("401 Unauthorized")
    build("hf:lab/none", *out, token=TOKEN).refused(f"'lab/none' {unknown}")
    build("hf:lab/open:few@v9", *out).refused("Revision 'v9' doesn't exist")
    build("hf:lab/open:many", *out).refused("'many' not found. Available: ['all', 'few']")
    build("hf:lab/open", *out).refused(
        "Config name is missing. Please pick one among the available configs: ['all', 'few']"
    )
    build("hf:lab/open:few", *out, "--split", "test").refused("no split 'test'; the splits are 'train'")
    build("hf:lab/empty", *out).refused("hf:lab/empty: cannot be read (")
    assert not (tmp_path / "out").exists()
