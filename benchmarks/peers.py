"""Other loaders over the same tuples, for `loader.py`: each as its own documentation sets it up for training.

Every peer shuffles, reads encoded members from its own format (written here from the same samples), and hands them to
the collate function that it is given, in the worker where there are workers. `PEERS` maps a name to a function
(folder, dataset, collate, batch size) -> (workers -> batches), which raises ImportError where the package is not there.
"""

from __future__ import annotations

import importlib.machinery
import io
import json
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from data_pipelines.dataset import Dataset, RawSample

Collate = Callable[[list[RawSample]], dict[str, Any]]
Peer = Callable[[int], Iterable[dict[str, Any]]]
MEMBERS = ("jpg", "txt", "flac", "json")


def raw(found: dict[str, Any]) -> RawSample:
    """A peer's sample, as bytes by extension, in the form that our collator takes."""
    members = (found["jpg"], found["txt"], found["flac"], found["json"])
    return RawSample(found["__key__"], "", *members, "jpg", "flac", None)


class UsualCollate:
    """What training scripts write: Pillow, soundfile, a batched tokenizer, float32 tensors, padded and stacked.

    Gives `image` float32 [B, 3, side, side] in 0..1, `audio` float32 [B, T], `input_ids` and `attention_mask` int64
    [B, L], `label` int64 [B].
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, side: int) -> None:
        self._tokenizer, self._side = tokenizer, side

    def __call__(self, samples: list[RawSample]) -> dict[str, Any]:
        images, waves = [], []
        for sample in samples:
            image = Image.open(io.BytesIO(sample.image or b"")).convert("RGB")
            pixels = np.array(image.resize((self._side, self._side), Image.Resampling.BICUBIC))
            images.append(torch.from_numpy(pixels).permute(2, 0, 1).float().div(255))
            waves.append(torch.from_numpy(soundfile.read(io.BytesIO(sample.audio or b""), dtype="float32")[0]))
        texts = [(sample.text or b"").decode() for sample in samples]
        return {
            "keys": [sample.key for sample in samples],
            "image": torch.stack(images),
            "audio": torch.nn.utils.rnn.pad_sequence(waves, batch_first=True),
            "label": torch.tensor([json.loads(sample.json or b"{}")["label"] for sample in samples]),
            **self._tokenizer(texts, padding=True, return_tensors="pt"),
        }


class _Batches(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Batches made where the samples are read: in the worker."""

    def __init__(self, samples: Iterable[RawSample], size: int, collate: Collate) -> None:
        self._samples, self._size, self._collate = samples, size, collate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batch: list[RawSample] = []
        for sample in self._samples:
            batch.append(sample)
            if len(batch) == self._size:
                yield self._collate(batch)
                batch = []


class _Raw:
    """The samples of an iterable of dicts, as `RawSample`."""

    def __init__(self, found: Iterable[dict[str, Any]]) -> None:
        self._found = found

    def __iter__(self) -> Iterator[RawSample]:
        return map(raw, self._found)


def _loader(dataset: Any, workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="fork" if workers else None,
    )


def webdataset_peer(folder: Path, dataset: Dataset, collate: Collate, size: int) -> Peer:
    """Shuffled shards and a buffer of 1,000 samples."""
    import webdataset

    shards = [str(dataset.path / entry.path) for entry in dataset.shards]

    def batches(workers: int) -> Iterable[dict[str, Any]]:
        stream = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, nodesplitter=webdataset.split_by_node)
        return _loader(_Batches(_Raw(stream.shuffle(1000)), size, collate), workers)

    return batches


def datasets_peer(folder: Path, dataset: Dataset, collate: Collate, size: int) -> Peer:
    """Hugging Face `datasets`, streaming the tars, with a buffer of 1,000 samples."""
    from datasets import Features, Value, load_dataset

    shards = [str(dataset.path / entry.path) for entry in dataset.shards]
    kinds = {"__key__": "string", "__url__": "string", "json": "binary", "txt": "binary"}
    features = Features({name: Value(kinds.get(name, "binary")) for name in ("__key__", "__url__", *MEMBERS)})

    def batches(workers: int) -> Iterable[dict[str, Any]]:
        from datasets.packaged_modules.webdataset import webdataset as module

        # Members stay bytes, as in the other peers.
        for extension in ("txt", "json"):
            module.WebDataset.DECODERS.pop(extension, None)
        stream = load_dataset("webdataset", data_files=shards, features=features, split="train", streaming=True)
        return _loader(_Batches(_Raw(stream.shuffle(seed=0, buffer_size=1000)), size, collate), workers)

    return batches


def _members(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for number in range(len(dataset)):
        sample = dataset.read([number])[0]
        yield {
            "__key__": sample.key,
            "jpg": sample.image,
            "txt": sample.text,
            "flac": sample.audio,
            "json": sample.json,
        }


def _without_torchvision() -> None:
    """An empty torchvision where the installed torch has none: the peers import it and never call it here."""
    try:
        import torchvision  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            module = _Empty(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            module.__path__ = []
            sys.modules[name] = module
        for name in ("torchvision.datasets", "torchvision.io", "torchvision.transforms.v2"):
            module = _Empty(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = module


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def mosaic_peer(folder: Path, dataset: Dataset, collate: Collate, size: int) -> Peer:
    """Mosaic Streaming, MDS format, its default shuffle."""
    _without_torchvision()
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    out = folder / "mds"
    if not out.exists():
        columns = {"__key__": "str", **dict.fromkeys(MEMBERS, "bytes")}
        with MDSWriter(out=str(out), columns=columns, size_limit=1 << 24) as writer:
            for sample in _members(dataset):
                writer.write(sample)
    clean_stale_shared_memory()

    def batches(workers: int) -> Iterable[dict[str, Any]]:
        clean_stale_shared_memory()
        found = StreamingDataset(local=str(out), shuffle=True, batch_size=size)
        return DataLoader(
            found,
            batch_size=size,
            num_workers=workers,
            drop_last=True,
            collate_fn=_CollateDicts(collate),
            multiprocessing_context="fork" if workers else None,
        )

    return batches


class _CollateDicts:
    """Collates a list of dicts of members."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        return self._collate([raw(one) for one in found])


class _Keep:
    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self._samples = samples

    def __call__(self, number: int) -> dict[str, Any]:
        return self._samples[number]


def litdata_peer(folder: Path, dataset: Dataset, collate: Collate, size: int) -> Peer:
    """litData's optimized format, shuffled, in its own data loader."""
    _without_torchvision()
    import litdata
    from litdata.streaming.writer import BinaryWriter

    out = folder / "litdata"
    if not out.exists():
        out.mkdir()
        writer = BinaryWriter(str(out), chunk_bytes=1 << 24)
        for number, sample in enumerate(_members(dataset)):
            writer[number] = sample
        writer.done()
        writer.merge()

    def batches(workers: int) -> Iterable[dict[str, Any]]:
        found = litdata.StreamingDataset(str(out), shuffle=True, drop_last=False)
        return litdata.StreamingDataLoader(
            found,
            batch_size=size,
            num_workers=workers,
            drop_last=True,
            collate_fn=_CollateDicts(collate),
            **({"multiprocessing_context": "fork"} if workers else {}),
        )

    return batches


def energon_peer(folder: Path, dataset: Dataset, collate: Collate, size: int) -> Peer:
    """Megatron Energon on our tars: its index beside them, a buffer of 1,000 samples, slices of 100 from each shard."""
    _without_torchvision()
    from megatron import energon
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    @energon.edataclass
    class Encoded(energon.Sample):
        found: RawSample

    @energon.stateless
    def cook(crude: dict[str, Any]) -> Any:
        return Encoded(**energon.basic_sample_keys(crude), found=raw(crude))

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        decoder = None
        cookers = (energon.Cooker(cook),)

        @energon.stateless
        def batch(self, samples: list[Any]) -> dict[str, Any]:
            return collate([sample.found for sample in samples])

        # Batches are plain dicts of tensors as they are; the default would map them to dataclasses.
        def encode_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            return batch

    out = folder / "energon"
    if not out.exists():
        out.mkdir()
        for entry in dataset.shards:
            (out / Path(entry.path).name).symlink_to(dataset.path / entry.path)
        names = [Path(entry.path).name for entry in dataset.shards]
        WebdatasetPreparator.prepare_dataset(out, names, split_parts_ratio=[("train", 1.0)], workers=1)
        module = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        (out / ".nv-meta" / "dataset.yaml").write_text(module)

    def batches(workers: int) -> Iterable[dict[str, Any]]:
        found = energon.get_train_dataset(
            out,
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
            batch_size=size,
            shuffle_buffer_size=1000,
            max_samples_per_sequence=100,
            task_encoder=Encoder(),
            repeat=False,
        )
        return energon.get_loader(found)

    return batches


PEERS = {
    "webdataset": webdataset_peer,
    "energon": energon_peer,
    "mosaic": mosaic_peer,
    "litdata": litdata_peer,
    "datasets": datasets_peer,
}
PACKAGES = {
    "webdataset": "webdataset",
    "energon": "megatron-energon",
    "mosaic": "mosaicml-streaming",
    "litdata": "litdata",
    "datasets": "datasets",
}
