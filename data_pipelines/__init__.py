"""Bytes in, batches out: datasets of image-text-audio tuples as plain WebDataset tars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipelines.dataset import Dataset as Dataset
    from data_pipelines.dataset import open_dataset as open_dataset
    from data_pipelines.shard import Sample as Sample

__all__ = ["Dataset", "Sample", "open_dataset"]


def __getattr__(name: str) -> Any:
    # Importing on first use keeps `import data_pipelines.order` at numpy's own cost.
    if name == "Sample":
        from data_pipelines.shard import Sample

        return Sample
    if name in ("Dataset", "open_dataset"):
        from data_pipelines import dataset

        return getattr(dataset, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
