"""The embedded digits: splits that do not touch, speech that can be heard, bytes that depend on the row alone."""

from __future__ import annotations

import io
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_pipelines.errors import BadInput
from data_pipelines.shard import Sample
from data_pipelines.sources import Row, open_source

pytest.importorskip("sklearn", reason="the embedded digits need the extra `demo`")
pytest.importorskip("espeakng_loader", reason="the embedded digits need the extra `demo`")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [row for row in open_source("digits").rows() if isinstance(row, Row)]


@pytest.fixture(scope="module")
def spoken(rows: list[Row]) -> list[tuple[Row, Sample]]:
    """Every twentieth tuple that has a sound."""
    source = open_source("digits")
    return [(row, source.read(row)) for row in [row for row in rows if row.audio][::20]]


def of_split(rows: list[Row], split: str) -> list[Row]:
    return [row for row in rows if row.metadata["split"] == split]


def test_sizes_keys_labels_and_missing_modalities(rows: list[Row]) -> None:
    for split, size in (("train", 3000), ("test", 500)):
        own = of_split(rows, split)
        assert [row.key for row in own] == [f"{split}-{number:05d}" for number in range(size)]
        assert sum(row.image is None for row in own) == sum(row.audio is None for row in own) == 0.15 * size
        assert not any(row.image is None and row.audio is None for row in own)
        assert all(row.text for row in own)
        counts = Counter(row.metadata["label"] for row in own)
        assert min(counts.values()) > 0.085 * size
    words = "zero one two three four five six seven eight nine".split()
    assert all(row.metadata["label_name"] == words[row.metadata["label"]] for row in rows)
    assert [row.key for row in open_source("digits", split="test").rows() if isinstance(row, Row)] == [
        row.key for row in of_split(rows, "test")
    ]


def test_test_pictures_and_voices_are_not_in_training_whatever_the_seeds(rows: list[Row]) -> None:
    other_seed = [row for row in open_source("digits", split="test", seed=7).rows() if isinstance(row, Row)]
    assert [row.image for row in other_seed] != [row.image for row in of_split(rows, "test")]
    train, test = of_split(rows, "train"), of_split(rows, "test") + other_seed
    for name in ("image_source", "speaker"):
        in_train = {row.metadata.get(name) for row in train} - {None}
        in_test = {row.metadata.get(name) for row in test} - {None}
        assert len(in_train) > 300 and len(in_test) > 90
        assert not in_train & in_test
    # Not even the timbre under another accent.
    timbres = [{row.metadata["speaker"].split("+")[1] for row in own if row.audio} for own in (train, test)]
    assert not timbres[0] & timbres[1]


def test_captions_vary_and_name_the_digit_and_only_what_is_there(rows: list[Row]) -> None:
    assert len({row.text for row in of_split(rows, "train")}) > 1500
    names = "zero one two three four five six seven eight nine".split()
    for row in rows:
        text = f" {row.text.lower()} ".replace(".", " ").replace(",", " ").replace(";", " ")
        named = {number for number, name in enumerate(names) if f" {name} " in text or f" {number} " in text}
        assert named == {row.metadata["label"]}, row.text
        if row.image is None:
            assert not any(word in text for word in ("picture", "image", "handwr", "wrote", "written", "white", "scan"))
        if row.audio is None:
            assert not any(word in text for word in ("say", "sound", "spoken", "read aloud", "recording", "hear"))


def test_pictures_are_white_on_black_and_look_like_their_pixels(rows: list[Row]) -> None:
    source = open_source("digits")
    for row in [row for row in rows if row.image][::200]:
        sample = source.read(row)
        picture = Image.open(io.BytesIO(sample.image or b""))
        assert (picture.format, picture.mode, picture.size, sample.image_extension) == ("PNG", "L", (28, 28), "png")
        pixels = np.asarray(picture, np.float64)
        assert pixels[[0, -1]].max() < 64 and pixels.max() > 180
        grid = np.pad(np.frombuffer(bytes.fromhex(row.image or ""), np.uint8).reshape(8, 8), 1)
        shrunk = np.asarray(picture.resize((10, 10), Image.Resampling.BOX), np.float64)
        assert np.corrcoef(shrunk.ravel(), grid.ravel())[0, 1] > 0.95


def test_speech_is_audible_short_and_trimmed(spoken: list[tuple[Row, Sample]]) -> None:
    seconds = []
    for _, sample in spoken:
        wave, rate = soundfile.read(io.BytesIO(sample.audio or b""))
        assert (rate, wave.ndim, sample.audio_extension) == (16_000, 1, "flac")
        seconds.append(len(wave) / rate)
        assert 0.1 < seconds[-1] < 1.2
        assert 0.02 < np.sqrt(np.mean(wave**2)) < 0.5
        assert 0.3 < np.abs(wave).max() < 1.0
        for end in (wave[:400], wave[-600:]):
            assert np.abs(end).max() > 0.002
    assert max(seconds) > 2 * min(seconds)
    assert len({sample.audio for _, sample in spoken}) == len(spoken)


def test_spoken_words_can_be_told_apart_across_voices(spoken: list[tuple[Row, Sample]], rows: list[Row]) -> None:
    """A nearest-centroid classifier on coarse spectra, fitted on training voices, hears what the test voices say."""
    source = open_source("digits")
    extra = [(row, source.read(row)) for row in of_split(rows, "test") if row.audio][::8]
    train = [pair for pair in spoken if pair[0].metadata["split"] == "train"]

    def features(pairs: list[tuple[Row, Sample]]) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for _, sample in pairs:
            wave, _ = soundfile.read(io.BytesIO(sample.audio or b""))
            frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, 200), 400)[::160] * np.hanning(400)
            power = np.abs(np.fft.rfft(frames, 512)) ** 2
            edges = np.geomspace(4, 257, 17).astype(int)
            bands = np.log(np.stack([power[:, a:b].mean(1) for a, b in zip(edges, edges[1:], strict=False)], 1) + 1e-6)
            bands -= bands.mean(0)
            places = np.linspace(0, len(bands) - 1, 12)
            found.append(np.stack([np.interp(places, np.arange(len(bands)), band) for band in bands.T]).ravel())
        return np.array(found), np.array([row.metadata["label"] for row, _ in pairs])

    x, y = features(train)
    centroids = np.stack([x[y == label].mean(0) for label in range(10)])
    test_x, test_y = features(extra)
    heard = np.argmin(((test_x[:, None] - centroids[None]) ** 2).sum(-1), axis=1)
    assert np.mean(heard == test_y) > 0.7


def test_a_row_gives_the_same_bytes_whatever_was_spoken_before(rows: list[Row]) -> None:
    """espeak-ng carries its oscillators' phase from one utterance to the next."""
    source = open_source("digits")
    some = [row for row in rows if row.audio][::60]
    forward = [source.read(row) for row in some]
    assert [source.read(row) for row in reversed(some)][::-1] == forward


def test_the_seed_alone_decides(rows: list[Row]) -> None:
    assert list(open_source("digits").rows()) == rows
    other = list(open_source("digits", seed=1).rows())
    assert sum(a == b for a, b in zip(rows, other, strict=True)) < 0.01 * len(rows)


@pytest.mark.parametrize("module", ["espeakng_loader", "sklearn.datasets"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipelines.sources import speech

    speech._installed.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    try:
        with pytest.raises(BadInput, match=r'needs .*: pip install "triptych\[demo\]"'):
            next(iter(open_source("digits").rows()))
    finally:
        speech._installed.cache_clear()


def test_unknown_splits_and_columns_are_refused() -> None:
    with pytest.raises(BadInput, match="no split 'val'; the splits are 'train', 'test'"):
        open_source("digits", split="val")
    with pytest.raises(BadInput, match="has no columns to map"):
        open_source("digits", columns={"image": "x"})
