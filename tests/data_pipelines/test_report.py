"""`report.info` counts what is in a dataset, and `tables` draws it without letting foreign text steer the terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_pipelines import report
from data_pipelines.errors import BadInput, printable
from data_pipelines.report import info
from data_pipelines.shard import Sample
from data_pipelines.tables import info_table
from tests.data_pipelines.tuples import encode_image, tuple_sample


def drawn(description: dict[str, object], width: int = 120) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(info_table(description))
    return file.getvalue()


def sample(number: int) -> Sample:
    """Sizes 16 x 8 and 24 x 8; every fourth has no picture; texts of 1 to 20 words."""
    pixels = np.zeros((8, 16 + 8 * (number % 2)), dtype=np.uint8)
    made = tuple_sample(number, missing="image" if number % 4 == 0 else "")
    return replace(made, image=made.image and encode_image(pixels), text=" ".join(["word"] * (number % 20 + 1)))


def test_sizes_and_histograms(make_dataset: Callable[..., Path]) -> None:
    told = info(make_dataset(sizes=(30, 10), sample=sample))
    assert told["combinations"] == {"image+text+audio": 30, "text+audio": 10}
    assert told["image_sizes"] == {"24x8": 20, "16x8": 10} and told["num_image_sizes"] == 2
    assert (told["image_pixels"]["min"], told["image_pixels"]["max"]) == (128, 192)
    assert told["text_tokens"] is None
    for name in ("image_width", "image_height", "image_pixels", "audio_seconds", "text_bytes"):
        edges, counts = told[name]["histogram"].values()
        assert len(edges) == len(counts) + 1 and edges == sorted(edges), name
        assert sum(counts) == (30 if name.startswith("image") else 40), name
        assert edges[0] == told[name]["min"] and edges[-1] >= told[name]["max"], name
    assert all(isinstance(edge, int) for edge in told["text_bytes"]["histogram"]["edges"])
    assert json.loads(json.dumps(told)) == told

    shown = drawn(told)
    for words in ("image+text+audio  30", "2 image sizes: 24x8 20, 16x8 10", "image height, pixels", "always 8", "█"):
        assert words in shown


def test_tokens_are_counted_with_a_tokenizer_folder(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / "tokenizer")
    told = info(make_dataset(sizes=(40,), sample=sample), tmp_path / "tokenizer")
    assert told["text_tokens"]["total"] == 2 * sum(range(1, 21))
    assert "text, tokens" in drawn(told)
    with pytest.raises(BadInput, match="not a tokenizer folder"):
        info(make_dataset(name="again", sizes=(1,)), tmp_path)


def test_bins_grow_where_a_few_values_are_far_above_the_rest() -> None:
    values = np.concatenate([np.full(90, 10), np.full(10, 100_000)])
    told = report._describe(values)
    assert told is not None
    edges = np.array(told["histogram"]["edges"])
    assert (edges[0], edges[-1], told["histogram"]["counts"][-1]) == (10, 100_000, 10)
    assert np.ptp(np.log(edges[1:] / edges[:-1])) < 0.01
    assert report._describe(np.empty(0)) is None


def test_no_pictures_and_no_labels(make_dataset: Callable[..., Path]) -> None:
    told = info(make_dataset(sizes=(3,), sample=lambda number: Sample(key=f"k{number}", text="hello")))
    assert told["image_sizes"] == {} and told["image_width"] is None and told["audio_seconds"] is None
    assert "always 5, total 15" in drawn(told)


def test_labels_cannot_steer_the_terminal(make_dataset: Callable[..., Path]) -> None:
    hostile = "\x1b[31mred\x07[bold]b[/bold]\u202e"
    folder = make_dataset(
        sizes=(2,), sample=lambda number: replace(tuple_sample(number), metadata={"label": 0, "label_name": hostile})
    )
    shown = drawn(info(folder))
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert r"\x1b[31mred\x07[bold]b[/bold]\u202e 2" in shown.replace("\n", "")


def test_a_description_from_elsewhere_is_drawn(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(2,))
    content = json.loads((folder / "dataset.json").read_text())
    content["modalities"]["[/b]"] = 1
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "build.json").write_text('{"source": "here"}')
    assert "[/b]" in drawn(info(folder))


def test_printable() -> None:
    assert printable("é ü 日本 a") == "é ü 日本 a"
    assert printable("a\nb\x9b\ud800") == r"a\nb\x9b\ud800"
