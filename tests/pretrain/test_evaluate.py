"""Scores of encoders whose answers are known, and the same result from one process and from two ZeRO ranks."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from data_pipelines import open_dataset
from data_pipelines.tokenizer import make_tokenizer
from launch.eval_commands import evaluate_target
from pretrain.config import Config, load_config
from pretrain.evaluate import evaluate, summary_line
from pretrain.results import blocks, table
from tests.small_run import CLASSES, config_text, small_dataset, small_run


class Oracle(torch.nn.Module):
    """Answers from the inputs themselves: the colour of the square, the pitch of the tone, the colour in the text.

    `confused` gives every input the same embedding, as a collapsed encoder does.
    """

    def __init__(self, tokenizer: Any, confused: bool = False) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.confused = confused
        self.calls: list[str] = []

    def _one_hot(self, kinds: list[int], name: str) -> torch.Tensor:
        self.calls.append(name)
        found = torch.zeros(len(kinds), 4)
        found[torch.arange(len(kinds)), torch.tensor([0 if self.confused else kind for kind in kinds])] = 1.0
        return found

    def encode_image(self, image: torch.Tensor, image_position: torch.Tensor) -> torch.Tensor:
        colours = image.float().reshape(len(image), -1, 3).sum(1)
        there = (image_position >= 0).all(-1).any(1)
        return self._one_hot([int(c.argmax()) if t else 3 for c, t in zip(colours, there, strict=True)], "image")

    def encode_audio(self, audio: torch.Tensor, audio_length: torch.Tensor) -> torch.Tensor:
        kinds = []
        for wave, length in zip(audio, audio_length.tolist(), strict=True):
            spectrum = torch.fft.rfft(wave[:length].float()).abs() if length else torch.zeros(2)
            kinds.append(round(int(spectrum.argmax()) * 8000 / max(length, 1) / 300) - 1 if length else 3)
        return self._one_hot(kinds, "audio")

    def encode_text(self, ids: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        texts = [self.tokenizer.decode(row[:n]) for row, n in zip(ids, length.tolist(), strict=True)]
        kinds = [next((c for c, name in enumerate(CLASSES) if name in text), 3) for text in texts]
        return self._one_hot(kinds, "text")

    def caption_nll(self, batch: dict[str, Any], see: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """One nat a token, and half a nat less for everything that is seen and there."""
        self.calls.append(f"caption {'+'.join(see)}")
        there = {"image": (batch["image_position"] >= 0).all(-1).any(1), "audio": batch["audio_length"] > 0}
        tokens = torch.where((batch["text_length"] > 0) & (batch["weight"] > 0), batch["text_length"] + 1, 0)
        rate = torch.full((len(tokens),), 2.0)
        for name in see:
            rate -= 0.5 * there[name]
        return rate * tokens, tokens


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("evaluate")
    small_dataset(folder / "train", "small-train", range(32))
    small_dataset(folder / "test", "small-test", range(100, 124))
    text = config_text(folder / "run", folder / "train", folder / "test", 2)
    (folder / "config.yaml").write_text(text)
    return load_config(folder / "config.yaml")


def score(config: Config, dataset: Any = None, **options: Any) -> tuple[dict[str, Any], Oracle]:
    tokenizer = make_tokenizer(config)
    oracle = Oracle(tokenizer, **options)
    return evaluate(oracle, config, dataset or open_dataset(config.data.eval), tokenizer), oracle


def test_a_perfect_encoder_has_perfect_scores(config):
    results, oracle = score(config)
    assert results["num_samples"] == 24
    zero_shot, retrieval = results["zero_shot"], results["retrieval"]
    assert zero_shot["classes"] == sorted(CLASSES)
    assert (zero_shot["image_top1"], zero_shot["audio_top1"]) == (1.0, 1.0)
    assert (zero_shot["num_images"], zero_shot["num_sounds"]) == (21, 21)
    assert zero_shot["image_per_class"] == dict.fromkeys(sorted(CLASSES), 1.0)
    for a, b in (("image", "text"), ("text", "image"), ("image", "audio"), ("audio", "text")):
        assert retrieval[f"{a}_to_{b}_class_p1"] == 1.0
    assert results["data"] == {"name": "small-test", "fingerprint": open_dataset(config.data.eval).fingerprint}
    assert not oracle.calls.count("image") - oracle.calls.count("audio")
    json.dumps(results, allow_nan=False)


def test_three_captions_are_three_things_to_find(config):
    retrieval = score(config)[0]["retrieval"]
    # Three different captions: a picture has one right caption, and a caption all pictures of its colour.
    found = retrieval["image_to_text"]
    assert (found["num_queries"], found["num_candidates"], found["R@1"]) == (18, 3, 1.0)
    assert retrieval["text_to_image"]["num_queries"] == 3
    assert retrieval["text_to_image"]["R@1"] == 1.0 and retrieval["text_to_image"]["chance_R@1"] == pytest.approx(1 / 3)
    # Six pictures share a colour, so the own sound ties with five others, and a tie is no hit.
    assert retrieval["image_to_audio"]["R@1"] == 0.0 and retrieval["image_to_audio"]["R@10"] == 1.0
    assert retrieval["image_to_audio"]["chance_R@1"] == pytest.approx(1 / 18)


def test_a_collapsed_encoder_scores_nothing(config):
    results, _ = score(config, confused=True)
    assert results["zero_shot"]["image_top1"] == results["zero_shot"]["audio_top1"] == 0.0
    assert results["retrieval"]["image_to_audio_class_p1"] == 0.0
    assert results["retrieval"]["audio_to_image"]["R@10"] == 0.0


def test_caption_loss_by_what_is_seen(config):
    caption = score(config)[0]["caption"]
    assert caption["loss_by_seen"] == {"both": 1.0, "image": 1.5, "audio": 1.5, "none": 2.0}
    assert 1.0 < caption["loss"] < 1.5
    assert caption["num_texts"] == 21
    summary = summary_line(score(config)[0])
    assert "image top-1 1.000" in summary and "24 samples" in summary


def test_batches_do_not_change_the_result_and_all_ranks_do_the_same_calls(config):
    tokenizer = make_tokenizer(config)
    dataset = open_dataset(config.data.eval)
    whole = evaluate(Oracle(tokenizer), config, dataset, tokenizer, batch_size=24)
    parts = evaluate(Oracle(tokenizer), config, dataset, tokenizer, batch_size=5)
    assert _without_seconds(whole) == _without_seconds(parts)


def test_what_is_absent_is_null(config, tmp_path):
    from dataclasses import replace

    from data_pipelines.dataset import commit_shard, write_dataset
    from tests.small_run import small_sample

    bare = [replace(small_sample(i), audio=None, metadata={}) for i in (0, 1, 2, 3)]
    write_dataset(tmp_path, "bare", [commit_shard(bare, tmp_path, "shards/bare.tar")])
    results, _ = score(config, open_dataset(tmp_path))
    assert results["zero_shot"]["image_top1"] is None and results["zero_shot"]["audio_top1"] is None
    assert results["retrieval"]["image_to_audio"] is None and results["retrieval"]["image_to_audio_class_p1"] is None
    assert results["retrieval"]["image_to_text"]["num_queries"] == 4
    assert results["caption"]["loss_by_seen"]["audio"] is None and results["caption"]["loss"] == 1.5
    assert [block.title for block in blocks(results)] == ["Retrieval", "Caption loss"]
    console = Console(record=True, width=80, file=open("/dev/null", "w"))
    console.print(table(results))
    text = console.export_text()
    # Nothing is cut in the narrowest usual terminal.
    assert "class P@1  chance  queries  answers" in text
    assert "bare: 4 samples" in text and "nan" not in text and "None" not in text


@pytest.mark.distributed
@pytest.mark.timeout(280)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_zero_ranks_and_one_process_agree(stage):
    folder = small_run(stage)
    ranks = json.loads((folder / "run" / "eval" / "results.json").read_text())
    alone = evaluate_target(folder / "run")
    assert alone["checkpoint"].endswith("step-00000004") and alone["step"] == ranks["step"] == 4
    _assert_close(_without_seconds(ranks), _without_seconds(alone), "")


def _without_seconds(results: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in results.items() if name in ("zero_shot", "retrieval", "caption", "num_samples")
    }


def _assert_close(a: Any, b: Any, where: str) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            _assert_close(a[name], b[name], f"{where}.{name}")
    elif isinstance(a, float) and isinstance(b, float):
        assert math.isclose(a, b, abs_tol=1e-5), f"{where}: {a} and {b}"
    else:
        assert a == b, f"{where}: {a} and {b}"


def test_evaluation_leaves_the_model_as_it_was(config):
    tokenizer = make_tokenizer(config)
    oracle = Oracle(tokenizer).train()
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist())
    evaluate(oracle, config, open_dataset(config.data.eval), tokenizer)
    assert oracle.training
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
