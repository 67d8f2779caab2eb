"""The demo's page: samples of the training data, the run's curves and scores, and captions of unseen test samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipelines import open_dataset
from data_pipelines.dataset import Dataset
from pretrain.config import Config

SHOWN = 6


def write_demo_report(out: Path, config: Config, results: dict[str, Any], exported: dict[str, Any]) -> None:
    """Write `report.html` into the demo's folder; the captions are those of the export.

    Args:
        out: the demo's folder, with dataset, run and export in it.
        config: the run's settings.
        results: its evaluation.
        exported: the outcome of the export's verification.
    """
    from pretrain.report import Group, Report, example, read_metrics, spread, write_report

    train, test = open_dataset(out / "dataset" / "train"), open_dataset(out / "dataset" / "test")
    audio = config.data.audio
    seen = [
        example(sample, audio, [("text", sample.text), ("label", _label(sample.metadata))])
        for sample in (train[i] for i in spread(train, SHOWN))
    ]
    captioned = []
    for modality, word in (("image", "picture"), ("audio", "sound")):
        ids = spread(test, SHOWN, need=(modality, "text"))
        texts = _captions(out / "export", test, ids, modality)
        shown = []
        for i, text in zip(ids, texts, strict=True):
            sample = test[i]
            lines = [("caption", text), ("reference", sample.text), ("label", _label(sample.metadata))]
            shown.append(example(sample, audio, lines, only=modality))
        captioned.append(
            Group(
                f"Captions of test {word}s",
                f"Written greedily by the exported model, which is given the {word} alone. The reference describes "
                "whatever the sample has.",
                shown,
            )
        )
    write_report(
        Report(
            name=config.run.name,
            subtitle=f"{config.model.preset} model, {len(train):,} training samples of {train.name}, "
            f"step {results['step']}",
            metrics=read_metrics(out / "run" / "metrics.jsonl"),
            results=results,
            groups=[
                Group("Training samples", "As they lie in the shards; any modality may be missing.", seen),
                *captioned,
            ],
            facts=_facts(out, config, train, test),
            verification=(
                exported["verified"],
                f"Export verified by a fresh process with transformers alone: {exported['num_parameters']:,} "
                f"parameters, {exported['num_probes']} probes, largest difference of a caption loss "
                f"{exported['largest_loss_difference']:.1g} nats."
                if exported["verified"]
                else f"Export not verified: {'; '.join(exported['problems'])}",
            ),
        ),
        out / "report.html",
    )


def _captions(export: Path, dataset: Dataset, ids: list[int], modality: str) -> list[str]:
    from pretrain.generate import caption_samples
    from pretrain.restore import restore_export

    return caption_samples(restore_export(export), dataset, ids, (modality,))


def _label(metadata: dict[str, Any]) -> str | None:
    name = metadata.get("label") if metadata.get("label_name") is None else metadata["label_name"]
    return None if name is None else str(name)


def _facts(out: Path, config: Config, train: Dataset, test: Dataset) -> dict[str, str]:
    run = json.loads((out / "run" / "run.json").read_text())
    losses = {name: weight for name, weight in config.losses.model_dump().items() if weight}
    return {
        "training data": f"{train.name}: {len(train):,} samples, fingerprint {train.fingerprint[:16]}",
        "test data": f"{test.name}: {len(test):,} samples, fingerprint {test.fingerprint[:16]}",
        "losses": ", ".join(f"{name} {weight:g}" for name, weight in losses.items()),
        "optimizer": f"AdamW, learning rate {config.train.learning_rate:g}, {config.train.schedule}, "
        f"{config.train.warmup_steps} warm-up steps, global batch {config.data.global_batch}",
        "processes": f"{run['world_sizes'][-1]}, ZeRO {config.engine.zero_stage}, {config.engine.precision}, "
        f"restarts {run['restarts']}",
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
