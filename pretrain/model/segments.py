"""Turn a batch into packed rows for one call of the language model.

A sample with text becomes up to two segments: the conditioned one, [BOS, image, audio, text, EOS] with whatever of
image and audio it shows, and the plain one, [BOS, text, EOS], which trains the language model on its own and whose
EOS is the text's place in the joint embedding. Segments are packed into rows; position ids restart at each, which is
how transformers keeps packed sequences apart. Everything here is index arithmetic on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from data_pipelines.balance import pack

_WIDTH_MULTIPLE = 16


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that frame the modalities."""

    bos: int
    eos: int
    image: int
    boi: int
    eoi: int
    audio: int
    boa: int
    eoa: int


@dataclass(frozen=True)
class PackedRows:
    """Packed segments of one micro-batch. Slots are positions in the flattened [R * L] rows."""

    ids: Tensor
    """int64 [R, L] token ids; image and audio placeholders where soft tokens go."""
    position: Tensor
    """int64 [R, L], restarting at 0 in every segment."""
    image_slots: Tensor
    """int64 [I], slots of image soft tokens, in the order of `image_source`."""
    image_source: Tensor
    """int64 [I], index into the image soft tokens of the batch, all samples concatenated."""
    audio_slots: Tensor
    audio_source: Tensor
    target_slots: Tensor
    """int64 [T], slots whose next token is predicted."""
    targets: Tensor
    """int64 [T], that next token."""
    target_sample: Tensor
    """int64 [T], the sample that the token belongs to."""
    readout_slots: Tensor
    """int64 [S], the EOS of each plain segment."""
    readout_sample: Tensor
    """int64 [S], its sample."""

    def to(self, device: torch.device) -> PackedRows:
        """Copy of the rows on another device."""
        return PackedRows(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def prompt(special: SpecialTokens, num_image: int, num_audio: int) -> list[int]:
    """[BOS, BOI, image..., EOI, BOA, audio..., EOA]; a part with no tokens is left out, frame and all."""
    ids = [special.bos]
    if num_image:
        ids += [special.boi, *[special.image] * num_image, special.eoi]
    if num_audio:
        ids += [special.boa, *[special.audio] * num_audio, special.eoa]
    return ids


def build_rows(
    text: Tensor,
    text_length: Tensor,
    num_image: np.ndarray,
    num_audio: np.ndarray,
    show_image: np.ndarray,
    show_audio: np.ndarray,
    special: SpecialTokens,
    row_tokens: int,
    *,
    plain: bool = True,
) -> PackedRows:
    """Lay out and pack the segments of a batch.

    Args:
        text: int64 [B, L] token ids; text_length: int64 [B], 0 where there is no text.
        num_image, num_audio: int [B], soft tokens that the towers produce for each sample (0 = none).
        show_image, show_audio: bool [B], what the conditioned segment may see.
        special: the framing tokens.
        row_tokens: most tokens of a row; rows are longer where a single segment is.
        plain: also lay out the [BOS, text, EOS] segments.

    Returns:
        The packed rows. There is always at least one, so that every rank calls the language model.
    """
    image_start = np.concatenate([[0], np.cumsum(num_image)])
    audio_start = np.concatenate([[0], np.cumsum(num_audio)])
    words, lengths = text.numpy(), text_length.numpy()
    segments: list[tuple[int, np.ndarray, int, bool]] = []
    for sample in np.flatnonzero(lengths):
        body = np.append(words[sample, : lengths[sample]], special.eos)
        images = int(num_image[sample]) if show_image[sample] else 0
        sounds = int(num_audio[sample]) if show_audio[sample] else 0
        if images or sounds:
            head = prompt(special, images, sounds)
            segments.append((int(sample), np.concatenate([head, body]), len(head), False))
        if plain or not (images or sounds):
            segments.append((int(sample), np.concatenate([[special.bos], body]), 1, True))
    if not segments:
        segments.append((-1, np.array([special.bos]), 1, False))

    sizes = np.array([len(ids) for _, ids, _, _ in segments])
    rows = pack(sizes, max(row_tokens, int(sizes.max())), _WIDTH_MULTIPLE)
    width = -(-max(sum(len(segments[s][1]) for s in row) for row in rows) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    ids = np.full((len(rows), width), special.eos, dtype=np.int64)
    position = np.zeros((len(rows), width), dtype=np.int64)
    slots: dict[str, list[np.ndarray]] = {name: [] for name in ("image", "image_source", "audio", "audio_source")}
    target_slots, targets, target_sample, readout_slots, readout_sample = [], [], [], [], []
    for r, row in enumerate(rows):
        at = 0
        for s in row:
            sample, tokens, start, is_plain = segments[s]
            size, base = len(tokens), r * width + at
            ids[r, at : at + size] = tokens
            position[r, at : at + size] = np.arange(size)
            if sample >= 0:
                for name, token, first in (
                    ("image", special.image, image_start[sample]),
                    ("audio", special.audio, audio_start[sample]),
                ):
                    found = np.flatnonzero(tokens[:start] == token)
                    slots[name].append(base + found)
                    slots[f"{name}_source"].append(first + np.arange(len(found)))
                target_slots.append(base + np.arange(start - 1, size - 1))
                targets.append(tokens[start:])
                target_sample.append(np.full(size - start, sample))
                if is_plain:
                    readout_slots.append(base + size - 1)
                    readout_sample.append(sample)
            at += size
        position[r, at:] = np.arange(width - at)

    def join(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)

    return PackedRows(
        ids=torch.from_numpy(ids),
        position=torch.from_numpy(position),
        image_slots=join(slots["image"]),
        image_source=join(slots["image_source"]),
        audio_slots=join(slots["audio"]),
        audio_source=join(slots["audio_source"]),
        target_slots=join(target_slots),
        targets=join(targets),
        target_sample=join(target_sample),
        readout_slots=torch.tensor(readout_slots, dtype=torch.int64),
        readout_sample=torch.tensor(readout_sample, dtype=torch.int64),
    )
