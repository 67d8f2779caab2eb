"""Memory has a ceiling, whatever is read, and does not grow from one epoch to the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.build import build_dataset
from data_pipelines.config import DataConfig
from data_pipelines.decode import MAX_AUDIO_BYTES, MAX_IMAGE_BYTES
from tests.data_pipelines import hostile
from tests.data_pipelines.hostile import MEMBERS, blank_png, corpus_tar
from tests.data_pipelines.tuples import tuple_sample

GIB = 1 << 30
# 64 million pixels, the most that the default settings decode, and half as many.
MOST, HALF = 8000, 5656


def wav_of(num_bytes: int) -> bytes:
    """Silence in 16-bit stereo."""
    return hostile.wav_that_declares(num_bytes - 44)[:44] + bytes(num_bytes - 44)


def largest_members() -> dict[str, Callable[[], bytes]]:
    """The most that each decoder is given at the default limits: name -> bytes."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    exif = hostile.png_chunk(b"eXIf", rotated.tobytes()[6:])
    return {
        "gray16.png": lambda: blank_png(MOST, MOST, depth=16, colour=0),
        "transparent.png": lambda: blank_png(MOST, MOST, colour=6),
        "rotated.png": lambda: blank_png(MOST, MOST, extra=exif),
        "wide.png": lambda: blank_png(65_535, 976),
        "colour.webp": lambda: hostile.saved(Image.new("RGBA", (HALF, HALF), (9, 9, 9, 9)), "WEBP", lossless=True),
        "inks.jpg": lambda: hostile.cmyk(HALF, HALF, progressive=True, subsampling=0),
        "noise.png": lambda: os.urandom(MAX_IMAGE_BYTES),
        "long.wav": lambda: wav_of(MAX_AUDIO_BYTES),
    }


@pytest.mark.timeout(1000)
def test_the_reader_stays_under_one_gib_through_the_whole_corpus(tmp_path: Path) -> None:
    corpus_tar(tmp_path / "corpus.tar", MEMBERS)
    good = hostile.GOOD_BEFORE
    for number, case in enumerate(hostile.TARS):
        (tmp_path / f"tar-{number:02d}.tar").write_bytes(case.make())
    with open(tmp_path / "large.tar", "wb") as file:
        for name, make in largest_members().items():
            file.write(hostile.entry(name, make()))
        # The largest of both kinds in one sample.
        file.write(hostile.entry("both.png", blank_png(MOST, MOST, colour=6).ljust(MAX_IMAGE_BYTES, b"\0")))
        file.write(hostile.entry("both.wav", wav_of(MAX_AUDIO_BYTES)))
        file.write(hostile.entry("over.txt", b"beside it") + hostile.entry("over.wav", wav_of(MAX_AUDIO_BYTES + 512)))
        file.write(good + hostile.END)
    done = subprocess.run(
        [sys.executable, "-m", "tests.data_pipelines.peak_memory", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    weights = found["weights"]
    read = {name: weights[name.partition(".")[0]] for name in largest_members()}
    assert {name for name, weight in read.items() if not weight} == {"noise.png"}, "these are within the limits"
    assert (weights["both"], weights["over"]) == (1, 0)
    assert found["peak"] < GIB, f"{found['peak'] / 2**20:.0f} MiB, {found['before'] / 2**20:.0f} of them before reading"


EPOCHS = """
import gc, json, os, sys
from pathlib import Path
from data_pipelines.config import AudioConfig, DataConfig, ImageConfig
from data_pipelines.dataset import open_dataset
from data_pipelines.loader import build_loader
from pretrain.config import Config, RunConfig, TrainConfig
from tests.data_pipelines.peak_memory import memory

folder, run, workers, kind = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
steps = len(open_dataset(folder)) // 16
config = Config(
    run=RunConfig(dir=run),
    train=TrainConfig(max_steps=10 * steps, warmup_steps=0),
    data=DataConfig(
        train=str(folder), global_batch=16, num_workers=workers, worker_type=kind, tail="drop",
        image=ImageConfig(size=28, patch_size=7, pooling=2), audio=AudioConfig(sampling_rate=8000, max_seconds=2.5),
    ),
)
found = []
for number, batch in enumerate(build_loader(config, 0, 1), start=1):
    assert batch["weight"].all()
    if number % steps == 0:
        gc.collect()
        found.append([memory("VmRSS"), len(os.listdir("/proc/self/fd"))])
print(json.dumps(found))
"""


def ten_epochs(folder: Path, run: Path, workers: int = 0, kind: str = "process") -> list[tuple[int, int]]:
    """(resident bytes, open files) of the reading process at the end of each of ten epochs."""
    done = subprocess.run(
        [sys.executable, "-c", EPOCHS, str(folder), str(run), str(workers), kind],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return [(resident, files) for resident, files in json.loads(done.stdout)]


def assert_flat(epochs: list[tuple[int, int]], data_bytes: int, waiting: int = 0) -> None:
    """From the second epoch to the tenth: no file more, and not a third of what those epochs read.

    Up to `waiting` batches may have come out of turn from worker processes, each in a block of its own.
    """
    resident, files = zip(*epochs[1:], strict=True)
    assert len(epochs) == 10 and max(files) <= min(files) + waiting, files
    growth = max(resident) - resident[0]
    assert growth < max(8 << 20, min(32 << 20, 9 * data_bytes // 3)), [n >> 10 for n in resident]


@pytest.mark.timeout(1000)
def test_ten_epochs_are_flat(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_dataset(sizes=(64, 64, 64, 64), sample=tuple_sample)
    assert_flat(ten_epochs(folder, tmp_path / "run"), sum(f.stat().st_size for f in (folder / "shards").iterdir()))


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("workers", "kind"), [(0, "process"), (2, "process"), (2, "thread")])
def test_ten_epochs_over_spoken_digits_are_flat(shared_data: Path, tmp_path: Path, workers: int, kind: str) -> None:
    manifest = shared_data / "spoken-digits" / "manifest.csv"
    folder = build_dataset(manifest, tmp_path / "digits", split="train", progress=False)
    epochs = ten_epochs(folder, tmp_path / "run", workers, kind)
    print([(resident >> 10, files) for resident, files in epochs])
    prefetched = DataConfig(train=str(folder)).prefetch * workers if kind == "process" else 0
    assert_flat(epochs, sum(f.stat().st_size for f in (folder / "shards").iterdir()), prefetched)
