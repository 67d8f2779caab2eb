"""`triptych data stats`: constants that, put into the config, make the model's input have mean 0 and deviation 1."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipelines.config import AudioConfig, DataConfig, ImageConfig
from data_pipelines.dataset import commit_shard, open_dataset, write_dataset
from data_pipelines.decode import load_audio, load_image, resize_image, to_int16
from data_pipelines.errors import BadInput
from data_pipelines.shard import Sample
from pretrain.config import load_config
from pretrain.features import log_mel
from pretrain.normalisation import measure
from tests.data_pipelines.tuples import encode_image, tuple_sample

DATA = DataConfig(
    train="unused",
    image=ImageConfig(size=28, patch_size=7, pooling=2),
    audio=AudioConfig(sampling_rate=8000, mel_bins=20, frame_ms=25, max_seconds=0.4),
)


def sample(number):
    """Green pictures; every seventh sample without one, every fifth without sound."""
    made = tuple_sample(number, missing="image" if number % 7 == 0 else "audio" if number % 5 == 0 else "")
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8) * np.uint8([[[0, 1, 0]]])
    return replace(made, image=made.image and encode_image(pixels))


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "dataset"
    entries = [commit_shard(map(sample, range(start, start + 75)), folder, f"shards/{start}.tar") for start in (0, 75)]
    write_dataset(folder, "dataset", entries)
    return open_dataset(folder)


def frames(dataset, audio):
    """Every whole frame as training makes it, in one batch a sound."""
    waves = [torch.from_numpy(to_int16(load_audio(s.audio, audio))) for s in dataset if s.audio is not None]
    length = torch.tensor([len(wave) for wave in waves])
    mel, mask = log_mel(torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), length, audio)
    return mel[mask].double().numpy()


def test_the_numbers_are_those_of_the_whole(dataset):
    found = measure(dataset, DATA, progress=False)
    pixels = np.concatenate(
        [
            np.asarray(resize_image(load_image(s.image, 10**6), DATA.image)).reshape(-1, 3) / 255
            for s in dataset
            if s.image is not None
        ]
    )
    mel = frames(dataset, DATA.audio)
    told = found.as_json()
    assert (told["num_samples"], told["image"]["num_images"], told["audio"]["num_sounds"]) == (150, 128, 125)
    np.testing.assert_allclose(told["image"]["mean"], pixels.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(told["image"]["std"], pixels.std(axis=0), rtol=1e-5)
    assert told["image"]["mean"][0] == 0 and told["image"]["std"][2] == 0
    assert told["audio"]["num_frames"] == len(mel)
    np.testing.assert_allclose(told["audio"]["per_bin_mean"], mel.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(told["audio"]["per_bin_std"], mel.std(axis=0), rtol=1e-5)
    assert (told["audio"]["mel_mean"], told["audio"]["mel_std"]) == pytest.approx((mel.mean(), mel.std()), rel=1e-5)


def test_the_lines_go_into_a_config_and_normalise(dataset, tmp_path):
    data = DATA.model_copy(update={"audio": DATA.audio.model_copy(update={"mel_mean": 4.0, "mel_std": 9.0})})
    lines = measure(dataset, data, progress=False).as_yaml()
    head = f"run: {{dir: runs/x, name: x}}\n{lines}"
    audio_settings = "    sampling_rate: 8000\n    mel_bins: 20\n    frame_ms: 25\n    max_seconds: 0.4\n"
    (tmp_path / "config.yaml").write_text(
        head.replace("  audio:\n", f"  train: unused\n  audio:\n{audio_settings}"), encoding="utf-8"
    )
    audio = load_config(tmp_path / "config.yaml").data.audio
    assert audio.mel_mean != 0 and audio.mel_std != 1
    normalised = frames(dataset, audio)
    assert (normalised.mean(), normalised.std()) == pytest.approx((0, 1), abs=1e-4)


def test_workers_change_nothing(dataset):
    alone = measure(dataset, DATA, workers=1, progress=False)
    together = measure(dataset, DATA, workers=3, progress=False)
    assert alone.as_yaml() == together.as_yaml()
    assert np.array_equal(alone.mel.mean, together.mel.mean) and np.array_equal(alone.mel.squares, together.mel.squares)
    some = measure(dataset, DATA, samples=10, progress=False)
    assert some.num_samples == 10 and some.as_yaml() != alone.as_yaml()


def test_what_does_not_decode_is_left_out_and_counted(tmp_path):
    samples = [
        replace(tuple_sample(0), image=b"no picture"),
        replace(tuple_sample(1), audio=b"no sound"),
        tuple_sample(2),
    ]
    write_dataset(tmp_path, "d", [commit_shard(samples, tmp_path, "shards/0.tar")])
    found = measure(open_dataset(tmp_path), DATA, progress=False)
    assert found.as_json()["left_out"] == {"audio decode": 1, "image format": 1}
    assert (found.num_images, found.num_sounds) == (2, 2)
    assert found.as_yaml().startswith("# 3 samples: 2 images, 2 sounds, 2 left out\n")


def test_one_modality_and_none(tmp_path):
    def dataset_of(name, **members):
        folder = tmp_path / name
        write_dataset(folder, name, [commit_shard([Sample(key="k", **members)], folder, "shards/0.tar")])
        return open_dataset(folder)

    quiet = measure(dataset_of("pictures", image=tuple_sample(0).image), DATA, progress=False)
    assert quiet.as_json()["audio"] is None and "mel_mean" not in quiet.as_yaml()
    deaf = measure(dataset_of("sounds", audio=tuple_sample(0).audio), DATA, progress=False)
    assert deaf.as_json()["image"] is None and "red" not in deaf.as_yaml()
    with pytest.raises(BadInput, match="neither a picture nor a sound to measure$"):
        measure(dataset_of("texts", text="hello"), DATA, progress=False)
    with pytest.raises(BadInput, match=r"nor a sound to measure \(1 x image format\)"):
        measure(dataset_of("broken", image=b"x"), DATA, progress=False)
