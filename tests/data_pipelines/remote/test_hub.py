"""Datasets in repositories of the Hugging Face Hub: the real client against a Hub on the loopback interface."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from data_pipelines import open_dataset
from data_pipelines.config import RemoteConfig
from data_pipelines.errors import BadInput
from data_pipelines.loader import build_loader
from tests.data_pipelines.remote.servers import free_port
from tests.data_pipelines.remote.test_batches import SIZES, config_of, local_batches, room_for
from tests.data_pipelines.remote.test_cache import watched
from tests.data_pipelines.test_loader import assert_same, by_sample
from tests.hub_server import SIGNATURE, TOKEN, Hub, Repo, running_hub

pytestmark = pytest.mark.timeout(240)
MakeDataset = Callable[..., Path]
Remote = Callable[..., RemoteConfig]
URL = "hf://datasets/lab/one"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub that this process's client talks to, with a token."""
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def files_of(folder: Path, below: str = "") -> dict[str, bytes]:
    return {
        below + path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_same_batches_from_a_private_repository(
    hub: Hub, make_dataset: MakeDataset, remote: Remote, tmp_path: Path, cache: Path
) -> None:
    folder = make_dataset(sizes=SIZES)
    expected = local_batches(folder, tmp_path / "local")
    hub.repos["datasets/lab/one"] = Repo(True, {"main": files_of(folder, "sets/one/")})
    url = f"{URL}/sets/one"
    cap = room_for(folder, 4)
    with watched(cache) as most:
        config = config_of(url, tmp_path / "run", remote(max_cache_gb=cap, ahead_steps=2), num_workers=1)
        assert_same(by_sample(build_loader(config, 0, 1)), expected)
    assert 0 < most() <= cap * 1e9
    # A file at a time and nothing else: the Hub's API has limits that the workers of a large run would meet.
    assert not hub.asked("^/api/datasets/")
    assert len(hub.asked(r"\.arrow$")) == len(SIZES)

    hub.requests.clear()
    config = config_of(url, tmp_path / "run", remote(mode="range"), num_workers=1)
    assert_same(by_sample(build_loader(config, 0, 1)), expected)
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", request.byte_range or "") for request in hub.asked(r"\.tar$")]
    longest = max(int(found[2]) + 1 - int(found[1]) for found in ranges if found)
    assert all(ranges) and longest < min(shard.bytes for shard in open_dataset(folder).shards) / 2

    assert {request.token for request in hub.requests if request.server == "hub"} == {TOKEN}
    assert {request.token for request in hub.requests if request.server == "storage"} == {None}
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert TOKEN.encode() not in written and SIGNATURE.encode() not in written


def test_branches_and_commits(hub: Hub, make_dataset: MakeDataset, remote: Remote) -> None:
    old, new = make_dataset("old", sizes=(3, 2)), make_dataset("new", sizes=(4,))
    repo = Repo(False, {"main": files_of(new), "v1/old": files_of(old), "refs/pr/7": files_of(old)})
    hub.repos["datasets/lab/one"] = repo
    for revision, folder in (
        ("", new),
        ("@main", new),
        ("@v1%2Fold", old),
        ("@refs/pr/7", old),
        (f"@{repo.commit_of('v1/old')}", old),
    ):
        found, local = open_dataset(URL + revision, remote()), open_dataset(folder)
        assert found.fingerprint == local.fingerprint
        assert [found[n] for n in range(len(local))] == [local[n] for n in range(len(local))]


def refusal(url: str, settings: RemoteConfig) -> str:
    with pytest.raises(BadInput) as caught:
        _ = open_dataset(url, settings)[0]
    said = str(caught.value)
    assert "\n" not in said and "hf_" not in said.replace("hf_hub", "") and SIGNATURE not in said
    return said


def test_what_is_refused_is_said_at_once(
    hub: Hub, make_dataset: MakeDataset, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(make_dataset(sizes=(3,)))
    hub.repos |= {"datasets/lab/one": Repo(True, {"main": files}), "datasets/lab/open": Repo(False, {"main": files})}
    unknown = "no such repository on the Hub, or a private one that the token (HF_TOKEN) may not read"
    for url, said in (
        ("hf://datasets/lab/none", unknown),
        (f"{URL}@v9", "no such revision of the repository"),
        (f"{URL}/absent", "no such file"),
    ):
        assert refusal(url, remote()) == f"{url}/dataset.json: {said}"
    assert refusal("hf://datasets", remote()).endswith("not in a repository; give hf://datasets/OWNER/NAME")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refusal(URL, remote()).endswith("dataset.json: the token (HF_TOKEN) is not valid, or may not read it (401)")
    monkeypatch.delenv("HF_TOKEN")
    assert refusal(URL, remote()) == f"{URL}/dataset.json: {unknown}"
    # One request each: none of these is tried again.
    assert len(hub.requests) == 5
    assert open_dataset("hf://datasets/lab/open", remote())[0].key == "sample-00000"

    hub.requests.clear()
    for mode in ("cache", "range"):
        assert "127.0.0.1 is a private" in refusal(URL, remote(mode=mode, allow_private_addresses=False))
    assert not hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(URL, remote()).endswith("dataset.json: HF_HUB_OFFLINE is set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    template = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert "gave up after 3 attempts without progress: ConnectError: " in refusal(URL, remote(retries=2))


def test_other_files_than_promised(hub: Hub, make_dataset: MakeDataset, remote: Remote, cache: Path) -> None:
    folder = make_dataset(sizes=(3,))
    files = files_of(folder)
    (shard,) = open_dataset(folder).shards
    repo = hub.repos["datasets/lab/one"] = Repo(True, {"main": files})

    repo.branches["main"] = files | {shard.path: files[shard.path][:-1000]}
    assert f"{shard.bytes - 1000:,} bytes at the server" in refusal(URL, remote())
    assert not list(cache.glob("*.tar"))
    # What is there of it already ends where the file at the server does.
    (cache / f".part-{shard.sha256}.tar-{shard.bytes}").write_bytes(files[shard.path][:-1000])
    assert f"{shard.bytes - 1000:,} bytes at the server" in refusal(URL, remote())
    repo.branches["main"] = files
    hub.serves_ranges = False
    assert refusal(URL, remote(mode="range")).endswith(f"{hub.url} does not serve ranges")
    hub.serves_ranges = True
    assert open_dataset(URL, remote())[2] == open_dataset(folder)[2]
