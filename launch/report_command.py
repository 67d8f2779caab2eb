"""`triptych report`: one HTML page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import BadInput
from launch.json_output import messages_to_stderr, say
from launch.status.target import run_directory

if TYPE_CHECKING:
    from data_pipelines.dataset import Dataset
    from pretrain.config import Config
    from pretrain.examples import Group


def report_command(target: str, out: Path | None = None, samples: int = 6, captions: bool = False) -> None:
    """Write the page, and print where it is.

    Args:
        target: run directory, config or job.
        out: HTML file; by default `report.html` in the run directory.
        samples: samples to show of the training data, and of the evaluation data with `captions`.
        captions: have the newest checkpoint describe samples of the evaluation data, which loads the model.

    Raises:
        BadInput: there is no such run, the page cannot be written, or with `captions` there is no checkpoint or no
            evaluation data.
    """
    from launch.report.of_run import write_run_report
    from launch.status.run_files import read_run

    path = run_directory(target)
    config = read_run(path).config
    with messages_to_stderr():
        groups = [] if config is None or not samples else [training_samples(config, samples)]
        if captions:
            groups += _captioned(path, samples)
        page = out or path / "report.html"
        try:
            write_run_report(path, page, groups=[group for group in groups if group.examples])
        except OSError as error:
            raise BadInput(f"{page}: cannot be written: {error.strerror}; name another file with --out") from None
    print(page)


def training_samples(config: Config, number: int) -> Group:
    """Samples of each source of the training data, as the run reads them."""
    from data_pipelines import open_dataset
    from pretrain.examples import Example, Group, example, spread

    shown: list[Example] = []
    sources = config.data.train_sources
    for place, source in enumerate(sources):
        try:
            dataset = open_dataset(source.path, config.data.remote)
        except BadInput as error:
            say(f"triptych: no samples of {source.path}: {error}")
            continue
        wanted = number * (place + 1) // len(sources) - number * place // len(sources)
        for i in spread(dataset, wanted):
            sample = dataset[i]
            texts = [("text", sample.text), ("label", _label(sample.metadata))]
            shown.append(example(sample, config.data.audio, texts))
    return Group("Training samples", "As they lie in the shards; any modality may be missing.", shown)


def _captioned(path: Path, number: int) -> list[Group]:
    """What the newest checkpoint says of evaluation samples, given the picture alone and the sound alone."""
    from data_pipelines import open_dataset
    from pretrain.restore import find_checkpoint, restore_run

    found, _ = find_checkpoint(path)
    restored = restore_run(path, found)
    sources = restored.config.data.eval_sources
    if not sources:
        raise BadInput("--captions: the run has no data.eval to describe")
    return caption_groups(restored, open_dataset(sources[0].path, restored.config.data.remote), number)


def caption_groups(restored: Any, dataset: Dataset, number: int) -> list[Group]:
    """Samples with the captions that a restored model gives them, by the modality that it was given."""
    from pretrain.examples import Group, example, spread
    from pretrain.generate import caption_samples

    groups = []
    for modality, word in (("image", "picture"), ("audio", "sound")):
        ids = spread(dataset, number, need=(modality, "text"))
        texts = caption_samples(restored, dataset, ids, (modality,))
        shown = []
        for i, text in zip(ids, texts, strict=True):
            sample = dataset[i]
            lines = [("caption", text), ("reference", sample.text), ("label", _label(sample.metadata))]
            shown.append(example(sample, restored.config.data.audio, lines, only=modality))
        note = f"Written greedily by the model, given the {word} alone; the reference describes the whole sample."
        groups.append(Group(f"Captions of test {word}s", note, shown))
    return groups


def _label(metadata: dict[str, Any]) -> str | None:
    name = metadata.get("label") if metadata.get("label_name") is None else metadata["label_name"]
    return None if name is None else str(name)
