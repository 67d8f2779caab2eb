"""The micro-batches that are planned are those that the loader makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.loader import build_loader
from launch.plan.batches import Expected, micro_batches
from launch.plan.decoding import decode_seconds
from pretrain.config import Config, load_config
from tests.small_run import config_text, small_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("planned")
    small_dataset(made / "train", "small-train", range(32))
    return made


def config_of(folder: Path, size: str, *overrides: str) -> Config:
    path = folder / f"config-{size}.yaml"
    path.write_text(config_text(folder / "run", folder / "train", folder / "train", size=size))
    return load_config(path, ["data.eval=null", *overrides])


@pytest.mark.parametrize(
    ("size", "overrides"),
    [("28", ()), ("null", ("data.augment.audio_speed=0.1", "data.augment.audio_shift_seconds=0.15"))],
)
def test_sizes_are_those_of_the_loaders_batches(folder: Path, size: str, overrides: tuple[str, ...]) -> None:
    config = config_of(folder, size, *overrides)
    steps = list(Expected(config, 2).shares())
    assert len(steps) == 4, "max_steps of them, which is the whole epoch"
    assert not (folder / "run" / "tokenizer").exists(), "planning writes nothing into the run directory"
    for rank in range(2):
        elsewhere = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder / "loader")})})
        for step, batch in zip(steps, build_loader(elsewhere, rank, 2), strict=True):
            planned, _ = next(micro_batches(step[rank], 4, config.data))
            assert planned["text_length"].tolist() == batch["text_length"].tolist()
            assert planned["seed"].tolist() == batch["seed"].tolist()
            assert planned["image_position"].shape == batch["image_position"].shape
            assert (planned["image_position"] == batch["image_position"]).all()
            assert (planned["audio_length"] - batch["audio_length"]).abs().max() <= 2


def test_without_data_every_sample_is_as_large_as_may_be(folder: Path) -> None:
    build = f"data.build=[{{source: digits, out: {folder / 'absent'}}}]"
    config = config_of(folder, "null", f"data.train={folder / 'absent'}", build)
    expected = Expected(config, 2)
    assert not expected.is_known and expected.totals() is None
    ((share,),) = expected.shares()
    batch, frames = next(micro_batches(share, 4, config.data))
    assert batch["image_position"].shape[1] == config.data.image.max_patches
    assert set(batch["text_length"].tolist()) == {config.data.text.max_tokens}
    assert frames >= 0.7 * 100 - 3
    assert len(expected.tokenizer) == config.data.text.vocab_size
    assert decode_seconds(config, expected)[1] == "assumed"


def test_an_epoch_is_counted_in_the_index(folder: Path) -> None:
    config = config_of(folder, "28")
    expected = Expected(config, 2)
    totals = expected.totals()
    assert totals is not None and totals.samples == 32
    # Of eight samples one has no text, one no image, one no sound.
    assert 28 * 5 < totals.text_tokens < 28 * 24
    assert totals.soft_tokens > 28 * 4
    assert 28 * 0.3 < totals.audio_hours * 3600 < 28 * 0.6
    seconds, known_by = decode_seconds(config, expected)
    assert known_by == "measured" and 0 < seconds < 1
