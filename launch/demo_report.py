"""The demo's page: samples of the training data, the run's curves and scores, and captions of unseen test samples."""

from __future__ import annotations

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
    from launch.report.of_run import write_run_report
    from launch.report_command import caption_groups, training_samples
    from pretrain.restore import restore_export

    train, test = open_dataset(out / "dataset" / "train"), open_dataset(out / "dataset" / "test")
    write_run_report(
        out / "run",
        out / "report.html",
        groups=[training_samples(config, SHOWN), *caption_groups(restore_export(out / "export"), test, SHOWN)],
        verification=(
            exported["verified"],
            f"Export verified by a fresh process with transformers alone: {exported['num_parameters']:,} "
            f"parameters, {exported['num_probes']} probes, largest difference of a caption loss "
            f"{exported['largest_loss_difference']:.1g} nats."
            if exported["verified"]
            else f"Export not verified: {'; '.join(exported['problems'])}",
        ),
        results=results,
        more_facts=_fingerprints(train, test),
    )


def _fingerprints(train: Dataset, test: Dataset) -> list[tuple[str, str]]:
    return [
        (f"{role} fingerprint", f"{dataset.name}: {len(dataset):,} samples, {dataset.fingerprint[:16]}")
        for role, dataset in (("training", train), ("test", test))
    ]
