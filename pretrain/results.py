"""Evaluation results for people: one line for a log, rows for the tables of terminal, card and report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table


class Row(NamedTuple):
    """One measured number, with what it would be by chance where that is known."""

    task: str
    measure: str
    value: float
    chance: float | None
    samples: int

    @property
    def is_share(self) -> bool:
        """Whether the value is a share (0..1), not a loss."""
        return not self.measure.startswith("nats")

    @property
    def text(self) -> str:
        """The value as people read it: a percentage, or nats to three places."""
        return f"{100 * self.value:.1f} %" if self.is_share else f"{self.value:.3f}"

    @property
    def chance_text(self) -> str:
        """Chance as people read it, empty where unknown."""
        return "" if self.chance is None else f"{100 * self.chance:.1f} %"


def rows(results: dict[str, Any]) -> list[Row]:
    """Every number of a result that was measured, in the order zero-shot, retrieval, captions."""
    found: list[Row] = []
    zero_shot, retrieval, captions = results["zero_shot"], results["retrieval"], results["caption"]
    classes = len(zero_shot["classes"])
    for modality, count in (("image", "num_images"), ("audio", "num_sounds")):
        if zero_shot[f"{modality}_top1"] is not None:
            name = f"zero-shot {modality} classification"
            found.append(Row(name, f"top-1 of {classes}", zero_shot[f"{modality}_top1"], 1 / classes, zero_shot[count]))
    for direction, scores in retrieval.items():
        if not isinstance(scores, dict):
            continue
        name = direction.replace("_to_", " to ")
        for measure in ("R@1", "R@5", "R@10"):
            chance = scores["chance_R@1"] if measure == "R@1" else None
            found.append(Row(f"{name} retrieval", measure, scores[measure], chance, scores["num_queries"]))
        precision = retrieval[f"{direction}_class_p1"]
        if precision is not None:
            chance = 1 / classes if classes else None
            found.append(Row(f"{name} retrieval", "class P@1", precision, chance, scores["num_queries"]))
    seen = {"both": "image and sound", "image": "the image", "audio": "the sound", "none": "nothing"}
    for name, loss in captions["loss_by_seen"].items():
        if loss is not None:
            found.append(Row(f"caption, given {seen[name]}", "nats a token", loss, None, captions["num_texts"]))
    return found


def summary_line(results: dict[str, Any]) -> str:
    """The main numbers in one line."""
    zero_shot, retrieval = results["zero_shot"], results["retrieval"]
    parts = [
        ("image top-1", zero_shot["image_top1"], "{:.3f}"),
        ("audio top-1", zero_shot["audio_top1"], "{:.3f}"),
        ("image to audio P@1", retrieval["image_to_audio_class_p1"], "{:.3f}"),
        ("caption loss", results["caption"]["loss"], "{:.3f}"),
    ]
    found = [f"{name} {form.format(value)}" for name, value, form in parts if value is not None]
    return ", ".join([*found, f"{results['num_samples']} samples"])


def table(results: dict[str, Any]) -> Table:
    """A table for the terminal."""
    from rich.table import Table

    name = results.get("data", {}).get("name", "")
    step = f", step {results['step']}" if results.get("step") is not None else ""
    shown = Table(title=f"{name}: {results['num_samples']} samples{step}", title_justify="left")
    shown.add_column("task")
    shown.add_column("measure")
    for column in ("value", "chance", "n"):
        shown.add_column(column, justify="right")
    previous = None
    for row in rows(results):
        if previous is not None and row.task.split()[-1] != previous.split()[-1]:
            shown.add_section()
        shown.add_row(
            row.task if row.task != previous else "", row.measure, row.text, row.chance_text, str(row.samples)
        )
        previous = row.task
    return shown
