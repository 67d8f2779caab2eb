"""What a model can do on a dataset: zero-shot classes, retrieval in six directions, caption loss.

The same function serves the run (all ranks, in lockstep, which ZeRO-3 needs), `triptych eval` and the demo. Every rank
encodes its share, the embeddings are gathered, put in dataset order, and scored on every rank alike, so the result does
not depend on the number of ranks. Zero-shot with prompt ensembles follows CLIP (Radford et al., 2021); retrieval with
several right answers a query follows the COCO protocol: a query is one distinct picture, sound or text.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.dataset import Dataset
from data_pipelines.decode import DecodeError
from data_pipelines.loader import build_eval_loader
from pretrain.config import Config
from pretrain.metrics.classification import per_class_top1, top1
from pretrain.metrics.retrieval import Bools, Ints, class_ranks, pair_ranks, recall_scores
from pretrain.results import summary_line

__all__ = ["evaluate", "summary_line"]

FORMAT_VERSION = 1
MODALITIES = ("image", "text", "audio")
DIRECTIONS = tuple((a, b) for a in MODALITIES for b in MODALITIES if a != b)
SEEN = {"both": ("image", "audio"), "image": ("image",), "audio": ("audio",), "none": ()}


class Collected:
    """Everything the scores need, one row a sample, in dataset order.

    Fields are dicts by modality: `embedding` float32 [N, E], `present` bool [N], `content` int64 [N] (equal for equal
    input); `nll` float64 [N] by what the caption saw; `num_tokens` int64 [N]; `index` int64 [N].
    """

    def __init__(self, table: dict[str, np.ndarray]) -> None:
        keep = np.flatnonzero(table["weight"] > 0)
        _, first = np.unique(table["index"][keep], return_index=True)
        rows = keep[first]
        self.index: Ints = table["index"][rows]
        self.embedding = {m: table[f"embedding_{m}"][rows] for m in MODALITIES}
        self.present: dict[str, Bools] = {m: table[f"present_{m}"][rows].astype(bool) for m in MODALITIES}
        self.content: dict[str, Ints] = {m: table[f"content_{m}"][rows] for m in MODALITIES}
        self.nll = {name: table[f"nll_{name}"][rows].astype(np.float64) for name in SEEN}
        self.num_tokens: Ints = table["num_tokens"][rows]


def evaluate(
    model: Any,
    config: Config,
    dataset: Dataset,
    tokenizer: Any,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Score `model` on `dataset`; every rank must call this, and every rank gets the same result.

    Args:
        model: an `OmniPretrainer`, bare or partitioned by ZeRO-3.
        config: the run's settings; `evaluation` has the prompts and the batch size.
        dataset: what to evaluate on. Any modality, and labels, may be missing.
        tokenizer: the run's tokenizer.
        rank, world_size: this process among those that evaluate together.
        device: where the model is.
        batch_size: samples a forward pass; None takes `config.evaluation.batch`.
        before_batch: called before each batch, equally often on every rank. What it raises ends the evaluation.

    Returns:
        A JSON-ready dict: `zero_shot`, `retrieval`, `caption`, `num_samples`, `data`, `seconds`. Scores are in 0..1,
        losses in nats a token, and null where the dataset has nothing to measure them on.
    """
    start = time.monotonic()
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            found = _collect(
                model, config, dataset, tokenizer, rank, world_size, torch.device(device), batch_size, before_batch
            )
            classes, labels = _labels(dataset, found.index)
            prompts = {
                "image": _encode_prompts(model, tokenizer, classes, config.evaluation.image_prompts),
                "audio": _encode_prompts(model, tokenizer, classes, config.evaluation.audio_prompts),
            }
    finally:
        model.train(was_training)
    return {
        "format_version": FORMAT_VERSION,
        "num_samples": len(found.index),
        "zero_shot": _zero_shot(found, classes, labels, prompts),
        "retrieval": _retrieval(found, labels),
        "caption": _caption(found),
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        "seconds": round(time.monotonic() - start, 3),
    }


def _collect(
    model: Any,
    config: Config,
    dataset: Dataset,
    tokenizer: Any,
    rank: int,
    world_size: int,
    device: torch.device,
    batch_size: int | None,
    before_batch: Callable[[], None],
) -> Collected:
    loader = build_eval_loader(config, dataset, tokenizer, rank, world_size, batch_size or config.evaluation.batch)
    parts: list[dict[str, Tensor]] = []
    for batch in loader:
        before_batch()
        part: dict[str, Tensor] = {"weight": batch["weight"], "index": batch["index"]}
        num_patches = (batch["image_position"] >= 0).all(-1).sum(1)
        for modality, values, length in (
            ("image", batch["image"], num_patches),
            ("audio", batch["audio"], batch["audio_length"]),
            ("text", batch["text"], batch["text_length"]),
        ):
            part[f"content_{modality}"] = _content(values, length)
            part[f"present_{modality}"] = (length > 0).to(torch.int64)
        part["embedding_image"] = model.encode_image(batch["image"], batch["image_position"])
        part["embedding_audio"] = model.encode_audio(batch["audio"], batch["audio_length"])
        part["embedding_text"] = model.encode_text(batch["text"], batch["text_length"])
        for name, see in SEEN.items():
            part[f"nll_{name}"], part["num_tokens"] = model.caption_nll(batch, see=see)
        parts.append({name: tensor.cpu() for name, tensor in part.items()})
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Collected({name: _gather(tensor, world_size, device).numpy() for name, tensor in joined.items()})


def _gather(tensor: Tensor, world_size: int, device: torch.device) -> Tensor:
    """[N, ...] on each rank -> [world_size * N, ...] on all; N is equal on all ranks because the loader pads."""
    if world_size == 1:
        return tensor
    mine = tensor.to(device).contiguous()
    shares = [torch.empty_like(mine) for _ in range(world_size)]
    torch.distributed.all_gather(shares, mine)
    return torch.cat(shares).cpu()


def _content(values: Tensor, length: Tensor) -> Tensor:
    """Hash of each row's valid part: equal inputs get equal numbers, on any rank and with any padding. int64 [B]."""
    rows, sizes = values.numpy(), length.tolist()
    digests = [hashlib.blake2b(rows[i, :n].tobytes(), digest_size=8).digest() for i, n in enumerate(sizes)]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


def _labels(dataset: Dataset, index: Ints) -> tuple[list[str], Ints]:
    """Class names in sorted order, and each sample's class, -1 without one. A label without a name is its own name."""
    names: list[str | None] = []
    for i in index.tolist():
        try:
            metadata = dataset.metadata(i)
        except DecodeError:
            metadata = {}
        name = metadata.get("label") if metadata.get("label_name") is None else metadata["label_name"]
        names.append(None if name is None or name == "" else str(name))
    classes = sorted({name for name in names if name is not None})
    number = {name: c for c, name in enumerate(classes)}
    return classes, np.array([-1 if name is None else number[name] for name in names], dtype=np.int64)


def _encode_prompts(model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """float32 [classes, E]: for each class the mean of its prompts' unit embeddings, of unit norm again."""
    rows = []
    for name in classes:
        # Not str.format: a class name or a prompt may hold braces of its own.
        texts = [template.replace("{}", name) for template in templates]
        # As captions are encoded: what looks like a special token in a class name is text.
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        length = torch.tensor([len(row) for row in ids], dtype=torch.int64)
        padded = torch.zeros(len(ids), max(1, int(length.max())), dtype=torch.int64)
        for i, row in enumerate(ids):
            padded[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mean = model.encode_text(padded, length).float().cpu().mean(0)
        rows.append(torch.nn.functional.normalize(mean, dim=0).numpy())
    return np.stack(rows) if rows else np.zeros((0, 1), dtype=np.float32)


def _zero_shot(found: Collected, classes: list[str], labels: Ints, prompts: dict[str, np.ndarray]) -> dict[str, Any]:
    result: dict[str, Any] = {"classes": classes}
    for modality, count in (("image", "num_images"), ("audio", "num_sounds")):
        use = found.present[modality] & (labels >= 0)
        result[count] = int(use.sum())
        measured = use.any() and len(classes) > 1
        scores = found.embedding[modality][use] @ prompts[modality].T if measured else None
        result[f"{modality}_top1"] = None if scores is None else top1(scores, labels[use])
        result[f"{modality}_per_class"] = (
            None if scores is None else dict(zip(classes, per_class_top1(scores, labels[use]), strict=True))
        )
    return result


def _retrieval(found: Collected, labels: Ints) -> dict[str, Any]:
    result: dict[str, Any] = {}
    precision: dict[str, float | None] = {}
    for a, b in DIRECTIONS:
        both = np.flatnonzero(found.present[a] & found.present[b])
        if len(both):
            _, query, of_query = np.unique(found.content[a][both], return_index=True, return_inverse=True)
            _, candidate, of_candidate = np.unique(found.content[b][both], return_index=True, return_inverse=True)
            found_ranks = pair_ranks(
                found.embedding[a][both[query]], found.embedding[b][both[candidate]], of_query, of_candidate
            )
            num_pairs = len(np.unique(np.stack([of_query, of_candidate]), axis=1).T)
            scores = recall_scores(found_ranks, num_candidates=len(candidate))
            result[f"{a}_to_{b}"] = scores | {"chance_R@1": num_pairs / (len(query) * len(candidate))}
        else:
            result[f"{a}_to_{b}"] = None
        queries = np.flatnonzero(found.present[a] & (labels >= 0))
        candidates = np.flatnonzero(found.present[b] & (labels >= 0))
        nearest = class_ranks(
            found.embedding[a][queries], found.embedding[b][candidates], labels[queries], labels[candidates]
        )
        precision[f"{a}_to_{b}_class_p1"] = float((nearest == 1).mean()) if len(nearest) else None
    return result | precision


def _caption(found: Collected) -> dict[str, Any]:
    image, audio, text = (found.present[m] for m in ("image", "audio", "text"))
    groups = {"both": text & image & audio, "image": text & image, "audio": text & audio, "none": text}

    def loss(name: str, rows: Bools) -> float | None:
        tokens = int(found.num_tokens[rows].sum())
        return float(found.nll[name][rows].sum() / tokens) if tokens else None

    return {
        "loss": loss("both", text),
        "num_tokens": int(found.num_tokens[text].sum()),
        "num_texts": int(text.sum()),
        "loss_by_seen": {name: loss(name, rows) for name, rows in groups.items()},
        "num_texts_by_seen": {name: int(rows.sum()) for name, rows in groups.items()},
    }
