"""A run's loader over remote shards: the same batches as from local disk, from servers that fail in every way."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines import open_dataset
from data_pipelines.config import AudioConfig, DataConfig, ImageConfig, RemoteConfig, SourceConfig
from data_pipelines.errors import BadInput
from data_pipelines.loader import build_eval_loader, build_loader
from data_pipelines.remote.ahead import is_fetching
from data_pipelines.tokenizer import make_tokenizer
from pretrain.config import Config, RunConfig, TrainConfig
from tests.data_pipelines.remote.servers import CuttingProxy, Nginx, running_gcs, running_s3
from tests.data_pipelines.remote.test_cache import watched
from tests.data_pipelines.test_loader import assert_same, by_sample

pytestmark = pytest.mark.timeout(480)
MakeDataset = Callable[..., Path]
Remote = Callable[..., RemoteConfig]
SIZES = (9, 12, 7, 10, 11, 8)


def config_of(source: str | list[SourceConfig], run: Path, remote: RemoteConfig, **data: Any) -> Config:
    settings = {
        "global_batch": 12,
        "num_workers": 0,
        "image": ImageConfig(size=32, patch_size=4, pooling=2),
        "audio": AudioConfig(sampling_rate=8000, max_seconds=1.0),
    } | data
    return Config(
        run=RunConfig(dir=str(run), seed=5),
        train=TrainConfig(max_steps=10, warmup_steps=0),
        data=DataConfig(train=source, remote=remote, **settings),
    )


def local_batches(folder: Path, run: Path) -> list[dict[int, dict[str, Any]]]:
    return by_sample(build_loader(config_of(str(folder), run, RemoteConfig()), 0, 1))


def room_for(folder: Path, num_shards: int) -> float:
    """GB of that many of the largest shards, and all indexes."""
    shards = open_dataset(folder).shards
    indexes = sum((folder / shard.index).stat().st_size for shard in shards)
    return (num_shards * max(shard.bytes for shard in shards) + indexes + 1000) / 1e9


@pytest.mark.parametrize("workers", [{"num_workers": 2}, {"num_workers": 2, "worker_type": "thread"}])
def test_the_same_batches_from_a_slow_server_that_cuts_and_fails_within_the_cap(
    workers: dict[str, Any], nginx: Nginx, make_dataset: MakeDataset, remote: Remote, tmp_path: Path, cache: Path
) -> None:
    folder = make_dataset(sizes=SIZES)
    expected = local_batches(folder, tmp_path / "local")
    for switch in ("slowish", "unreliable"):
        nginx.turn(switch)
    proxy = CuttingProxy(nginx.port, lambda number: 40_000 if number % 2 else None)
    cap = room_for(folder, 4)
    url = f"http://127.0.0.1:{proxy.port}/dataset"
    config = config_of(url, tmp_path / "run", remote(max_cache_gb=cap, ahead_steps=2, downloads=2), **workers)
    with watched(cache) as most:
        loader = build_loader(config, 0, 1)
        found = by_sample(loader)
    assert_same(found, expected)
    assert 0 < most() <= cap * 1e9
    assert proxy.cuts > 3 and 503 in {request.status for request in nginx.requests()}
    assert loader.remote_wait_seconds > 0
    assert loader.state(10) == build_loader(config_of(str(folder), tmp_path / "run", RemoteConfig()), 0, 1).state(10)
    # The same again, from what is there: a resumed run on the same node.
    assert_same(by_sample(build_loader(config, 0, 1, start_step=7)), expected[7:])
    proxy.close()


def test_ranges_and_a_mixture_with_a_local_source(
    nginx: Nginx, make_dataset: MakeDataset, remote: Remote, tmp_path: Path, cache: Path
) -> None:
    one, other = make_dataset("one", sizes=(9, 12)), make_dataset("other", sizes=(7, 10))

    def batches(path: str, run: str, settings: RemoteConfig, **data: Any) -> list[dict[int, dict[str, Any]]]:
        sources = [SourceConfig(path=str(one), weight=3.0), SourceConfig(path=path)]
        return by_sample(build_loader(config_of(sources, tmp_path / run, settings, **data), 0, 1))

    expected = batches(str(other), "local", RemoteConfig())
    assert_same(batches(nginx.url("other"), "ranges", remote(mode="range"), num_workers=1), expected)
    assert not list(cache.glob("*.tar"))
    assert_same(batches(nginx.url("other"), "cached", remote()), expected)
    assert len(list(cache.glob("*.tar"))) == 2


def _rank(config: Config, rank: int, results: Any) -> None:
    results.put([batch["index"].tolist() for batch in build_loader(config, rank, 2)])


def test_two_ranks_share_one_download(
    nginx: Nginx, make_dataset: MakeDataset, remote: Remote, tmp_path: Path, cache: Path
) -> None:
    folder = make_dataset(sizes=SIZES)
    local = config_of(str(folder), tmp_path / "local", RemoteConfig())
    expected = [batch["index"].tolist() for batch in build_loader(local, 0, 1)]
    nginx.turn("slowish")
    config = config_of(nginx.url(), tmp_path / "run", remote())
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    ranks = [fork.Process(target=_rank, args=(config, rank, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    shares = [results.get(timeout=200) for _ in ranks]
    for process in ranks:
        process.join(60)
    assert [sorted(one + two) for one, two in zip(*shares, strict=True)] == [sorted(step) for step in expected]
    asked = Counter(request.path for request in nginx.requests(".tar") + nginx.requests(".arrow"))
    assert set(asked.values()) == {1} and len(asked) == 2 * len(SIZES)
    assert {request.status for request in nginx.requests()} == {200}


def test_evaluation_reads_ahead_in_dataset_order(
    nginx: Nginx, make_dataset: MakeDataset, remote: Remote, tmp_path: Path
) -> None:
    folder = make_dataset(sizes=SIZES)
    local = config_of(str(folder), tmp_path / "run", RemoteConfig())
    config = config_of(nginx.url(), tmp_path / "run", remote(max_cache_gb=room_for(folder, 2)))
    tokenizer = make_tokenizer(local)

    def batches(dataset: Any, of: Config) -> list[list[str]]:
        return [batch["keys"] for batch in build_eval_loader(of, dataset, tokenizer, 0, 1, 10)]

    assert batches(open_dataset(nginx.url(), config.data.remote), config) == batches(open_dataset(folder), local)


def test_evaluation_while_training_fetches_forks_no_process(
    nginx: Nginx, make_dataset: MakeDataset, remote: Remote, tmp_path: Path
) -> None:
    """A fork beside threads that fetch may inherit a lock that nobody lets go of."""
    make_dataset(sizes=SIZES)
    nginx.turn("slow")
    config = config_of(nginx.url(), tmp_path / "run", remote(), num_workers=2)
    training = iter(build_loader(config, 0, 1))
    next(training)
    assert is_fetching()
    workers = set(multiprocessing.active_children())
    dataset, tokenizer = open_dataset(nginx.url(), config.data.remote), make_tokenizer(config)
    evaluation = iter(build_eval_loader(config, dataset, tokenizer, 0, 1, 10))
    next(evaluation)
    assert len(workers) == 2 and set(multiprocessing.active_children()) == workers
    evaluation.close()
    training.close()


def test_a_cap_below_one_shard_and_a_lost_shard_end_the_run_in_one_line(
    nginx: Nginx, make_dataset: MakeDataset, remote: Remote, tmp_path: Path
) -> None:
    folder = make_dataset(sizes=SIZES)
    run = tmp_path / "run"
    make_tokenizer(config_of(str(folder), run, RemoteConfig()))
    small = config_of(nginx.url(), run, remote(max_cache_gb=0.00002), num_workers=1)
    with pytest.raises(BadInput, match=r"^data\.remote\.max_cache_gb: the cap of 2e-05 GB on .* has no room"):
        list(build_loader(small, 0, 1))
    (folder / open_dataset(folder).shards[2].path).unlink()
    with pytest.raises(BadInput, match=r"^http://127\.0\.0\.1.*000002\.tar: HTTP 404") as caught:
        list(build_loader(config_of(nginx.url(), run, remote(), num_workers=1), 0, 1))
    assert "\n" not in str(caught.value)


def assert_a_shorter_shard_is_told(files: Any, folder: Path, url: str, settings: RemoteConfig) -> None:
    """Whether nothing of it is there yet, or as much as the server has. `files` can write below `url`."""
    shard = open_dataset(folder).shards[0]
    data = (folder / shard.path).read_bytes()
    files.pipe(f"{url}{shard.path}", data[:-1000])
    cache = Path(str(settings.cache_dir))
    cache.mkdir()
    for part in (b"", data[:-1000]):
        (cache / f".part-{shard.sha256}.tar-{shard.bytes}").write_bytes(part)
        with pytest.raises(BadInput, match=f"{shard.bytes - 1000:,} bytes at the server, in dataset.json"):
            _ = open_dataset(url, settings)[0]
    files.pipe(f"{url}{shard.path}", data)


SECRET = "the-secret-of-this-test"


def assert_same_in_both_modes(url: str, folder: Path, place: Path, remote: Remote, cache: Path) -> None:
    """The batches of the local folder, through a cache that stays within its cap and by ranges."""
    expected = local_batches(folder, place / "local")
    cap = room_for(folder, 4)
    with watched(cache) as most:
        config = config_of(url, place / "run", remote(max_cache_gb=cap, ahead_steps=2), num_workers=1)
        assert_same(by_sample(build_loader(config, 0, 1)), expected)
    assert 0 < most() <= cap * 1e9
    config = config_of(url, place / "run", remote(mode="range"), num_workers=1)
    assert_same(by_sample(build_loader(config, 0, 1)), expected)


def test_the_same_batches_from_s3(
    make_dataset: MakeDataset, remote: Remote, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs = pytest.importorskip("s3fs", reason="no s3fs here: pip install 'triptych[s3]'")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    given = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    folder = make_dataset(sizes=SIZES)
    with running_s3(tmp_path / "s3") as endpoint:
        files = s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True)
        files.mkdir("bucket")
        files.put(str(folder), "bucket/sets/one", recursive=True)
        url = "s3://bucket/sets/one/"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert_same_in_both_modes(url, folder, tmp_path, remote, cache)

        assert_a_shorter_shard_is_told(files, folder, url, remote(cache_dir=str(tmp_path / "other")))
        with pytest.raises(BadInput, match=r"absent/dataset\.json: no such file") as caught:
            open_dataset("s3://bucket/absent", remote())
        assert SECRET not in str(caught.value)
        with pytest.raises(BadInput, match=r"^127\.0\.0\.1 is a private"):
            open_dataset(url, remote(allow_private_addresses=False))
        # An endpoint that only the client knows of is refused when it connects.
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        (tmp_path / "aws").write_text(f"[default]\nendpoint_url = {endpoint}\n")
        assert open_dataset(url, remote())[0].key == "sample-00000"
        with pytest.raises(BadInput, match=r"^127\.0\.0\.1 is a private"):
            open_dataset(url, remote(allow_private_addresses=False))
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert SECRET.encode() not in written


def test_the_same_batches_from_gcs(
    make_dataset: MakeDataset, remote: Remote, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = pytest.importorskip("gcsfs.core", reason="no gcsfs here: pip install 'triptych[gs]'")
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "CLOUDSDK_", "STORAGE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    # Nobody is to be asked for credentials.
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    folder = make_dataset(sizes=SIZES)
    with running_gcs(tmp_path / "gcs") as endpoint:
        files = core.GCSFileSystem(endpoint_url=endpoint, token="anon", skip_instance_cache=True)
        files.put(str(folder), "bucket/sets/one", recursive=True)
        url = "gs://bucket/sets/one/"
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        assert_same_in_both_modes(url, folder, tmp_path, remote, cache)

        for absent in ("gs://bucket/absent", "gs://no-bucket/one"):
            with pytest.raises(BadInput, match=rf"^{absent}/dataset\.json: no such file$"):
                open_dataset(absent, remote())
        assert_a_shorter_shard_is_told(files, folder, url, remote(cache_dir=str(tmp_path / "other")))
        for given in (endpoint, endpoint.removeprefix("http://")):
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", given)
            with pytest.raises(BadInput, match=r"^127\.0\.0\.1 is a private"):
                open_dataset(url, remote(allow_private_addresses=False))
