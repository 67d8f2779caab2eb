"""Evaluation results for people: one line for a log, and blocks for the tables of terminal, card and report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Group

_SEEN = {"both": "image and sound", "image": "image alone", "audio": "sound alone", "none": "nothing"}


class Block(NamedTuple):
    """One table: what it measures, the names of its columns, and its rows of text; the first column is a name."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def blocks(results: dict[str, Any]) -> list[Block]:
    """Everything that was measured, as tables; what was not has no row, and a table without rows is left out."""
    found = [_zero_shot(results["zero_shot"]), _retrieval(results), _captions(results["caption"])]
    return [block for block in found if block.rows]


def summary_line(results: dict[str, Any]) -> str:
    """The main numbers in one line."""
    zero_shot, retrieval = results["zero_shot"], results["retrieval"]
    parts = [
        ("image top-1", zero_shot["image_top1"]),
        ("audio top-1", zero_shot["audio_top1"]),
        ("image to audio P@1", retrieval["image_to_audio_class_p1"]),
        ("caption loss", results["caption"]["loss"]),
    ]
    found = [f"{name} {value:.3f}" for name, value in parts if value is not None]
    return ", ".join([*found, f"{results['num_samples']} samples"])


def table(results: dict[str, Any]) -> Group:
    """What a rich console prints."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    step = f", step {results['step']}" if results.get("step") is not None else ""
    parts: list[Any] = [Text(f"{results['data']['name']}: {results['num_samples']} samples{step}", style="bold")]
    for block in blocks(results):
        shown = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        for i, name in enumerate(block.header):
            shown.add_column(name, justify="left" if i == 0 else "right", min_width=15 if i == 0 else None)
        for row in block.rows:
            shown.add_row(*row)
        parts += [Text(), Text(block.title), shown]
    return Group(*parts)


def _zero_shot(scores: dict[str, Any]) -> Block:
    classes = len(scores["classes"])
    rows = [
        (word, _share(scores[f"{modality}_top1"]), _share(1 / classes), str(scores[count]))
        for modality, count, word in (("image", "num_images", "images"), ("audio", "num_sounds", "sounds"))
        if scores[f"{modality}_top1"] is not None
    ]
    note = "The class whose prompt's embedding is nearest to the input's. No label was trained on."
    return Block(f"Zero-shot classification, {classes} classes", note, ("of", "top-1", "chance", "samples"), rows)


def _retrieval(results: dict[str, Any]) -> Block:
    scores, classes = results["retrieval"], len(results["zero_shot"]["classes"])
    rows = []
    for direction, found in scores.items():
        if not isinstance(found, dict):
            continue
        precision = scores[f"{direction}_class_p1"]
        measures = (found["R@1"], found["R@5"], found["R@10"], precision, found["chance_R@1"])
        counts = (str(found["num_queries"]), str(found["num_candidates"]))
        rows.append((direction.replace("_to_", " to "), *map(_share, measures), *counts))
    chance = f" (chance {_share(1 / classes)})" if classes else ""
    note = (
        "R@k: a right answer is among the k nearest, where equal inputs count as one; chance is that of R@1. "
        f"Class P@1: the nearest is of the query's class{chance}."
    )
    header = ("query to answer", "R@1", "R@5", "R@10", "class P@1", "chance", "queries", "answers")
    return Block("Retrieval", note, header, rows)


def _captions(scores: dict[str, Any]) -> Block:
    rows = [
        (_SEEN[name], f"{loss:.3f}", str(scores["num_texts_by_seen"][name]))
        for name, loss in scores["loss_by_seen"].items()
        if loss is not None
    ]
    return Block("Caption loss", "Nats a token of the reference text.", ("given", "loss", "samples"), rows)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
