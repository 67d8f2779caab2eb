"""Encoded samples into the arrays of one batch.

This runs inside a worker: what leaves it is uint8 and int16, padded and stacked. A sample of which any member is bad
becomes a placeholder of weight 0 in its place, so that the order of the others never shifts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_pipelines import augment
from data_pipelines.block import Block, allocate
from data_pipelines.config import AugmentConfig, DataConfig
from data_pipelines.dataset import LIMITS, MAX_METADATA_BYTES, RawSample
from data_pipelines.decode import (
    DecodeError,
    decode_metadata,
    decode_text,
    load_audio,
    load_image,
    max_samples,
    patch_positions,
    patchify,
    resize_image,
    to_int16,
)
from data_pipelines.index import Quarantined
from data_pipelines.tokenizer import TextEncoder

# No token of a vocabulary is longer on average, so a text that is cut here loses nothing that would be kept.
_CHARACTERS_A_TOKEN = 64


@dataclass
class _Decoded:
    """One sample's arrays; None where the sample has none."""

    patches: npt.NDArray[np.uint8] | None = None
    positions: npt.NDArray[np.int64] | None = None
    wave: npt.NDArray[np.int16] | None = None
    ids: list[int] | None = None
    label: int = -1


@dataclass(frozen=True)
class Collated:
    """A batch's arrays (see `Collator`) in one block, and the bad samples: place -> line for quarantine.jsonl."""

    block: Block
    keys: list[str]
    bad: dict[int, Quarantined]


class Collator:
    """Decodes, augments, tokenizes and stacks samples.

    Calling it with B samples gives: `image` uint8 [B, P, 3*p*p]; `image_position` int64 [B, P, 2] as (x, y), -1 where
    there is no patch; `audio` int16 [B, T], zero padded; `audio_length` int64 [B]; `text` int64 [B, L], 0 padded;
    `text_length` int64 [B]; `weight` float32 [B], 0 for a bad sample; `label` int64 [B], -1 for none. P is fixed when
    images have a fixed size, else the batch's most; every axis has at least length 1.
    """

    def __init__(self, config: DataConfig, encoder: TextEncoder, augmentation: AugmentConfig | None) -> None:
        self._config = config
        self._encoder = encoder
        self._augmentation = augmentation
        self._augments_image = augmentation is not None and augment.ImageAugment.is_active(augmentation)
        self._augments_audio = augmentation is not None and augment.changes_audio(augmentation)
        side = config.image.size
        # Twice the size leaves the resize enough to smooth; a crop may keep as little as this share of the area.
        keep = math.sqrt(augmentation.image_crop) if self._augments_image and augmentation is not None else 1.0
        draft = config.image.draft and side is not None
        self._enough = (math.ceil(2 * side / keep),) * 2 if draft and side is not None else None
        self.limits = {**LIMITS, "text": config.text.max_bytes}

    def __call__(self, samples: Sequence[RawSample], seeds: Sequence[int], folders: Sequence[str]) -> Collated:
        """Collate; `folders` are the samples' dataset folders, for the lines about bad ones."""
        return self.collate(enumerate(samples), seeds, folders)

    def collate(
        self, samples: Iterable[tuple[int, RawSample]], seeds: Sequence[int], folders: Sequence[str]
    ) -> Collated:
        """Collate samples that come one by one in any order as (place in the batch, sample): each place once.

        What a sample's bytes took is free again before the next one comes.
        """
        decoded = [_Decoded()] * len(seeds)
        keys = [""] * len(seeds)
        bad: dict[int, Quarantined] = {}
        for place, raw in samples:
            keys[place] = raw.key
            try:
                decoded[place] = self._decode(raw, seeds[place])
            except _BadMember as error:
                bad[place] = Quarantined(
                    f"{folders[place]}/{raw.shard}", raw.key, error.member, error.fault.reason, error.fault.detail
                )
            del raw
        return Collated(self._stack(decoded, bad), keys, dict(sorted(bad.items())))

    def _decode(self, raw: RawSample, seed: int) -> _Decoded:
        result = _Decoded()
        member = None
        try:
            if raw.too_large is not None:
                member = _extension(raw, raw.too_large)
                limit = self.limits[raw.too_large]
                raise DecodeError("size", f"the {raw.too_large} is larger than the limit of {limit} bytes")
            if raw.json is not None:
                member = "json"
                result.label = _label(decode_metadata(raw.json, MAX_METADATA_BYTES))
            if raw.text is not None:
                member = "txt"
                text = decode_text(raw.text, self._config.text.max_bytes)
                if text is not None:
                    most = self._config.text.max_tokens
                    result.ids = self._encoder(text[: most * _CHARACTERS_A_TOKEN])[:most]
            if raw.image is not None:
                member = raw.image_extension
                result.patches, result.positions = self._image(raw.image, seed)
            if raw.audio is not None:
                member = raw.audio_extension
                result.wave = self._audio(raw.audio, seed)
            if result.patches is None and result.wave is None and not result.ids:
                member = None
                raise DecodeError("empty", "neither image nor text nor sound")
        except DecodeError as error:
            raise _BadMember(f"{raw.key}.{member}" if member else None, error) from error
        return result

    def _image(self, data: bytes, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        config = self._config.image
        image = load_image(data, config.max_pixels, self._enough)
        if self._augments_image and self._augmentation is not None:
            draw = augment.ImageAugment(self._augmentation, augment.generator(seed, augment.IMAGE_STREAM))
            pixels = draw.apply(resize_image(image, config, draw.crop_box(*image.size)))
        else:
            pixels = np.asarray(resize_image(image, config))
        height, width, _ = pixels.shape
        return patchify(pixels, config.patch_size), patch_positions(
            width // config.patch_size, height // config.patch_size
        )

    def _audio(self, data: bytes, seed: int) -> npt.NDArray[np.int16]:
        config = self._config.audio
        wave = load_audio(data, config)
        if self._augments_audio and self._augmentation is not None:
            random = augment.generator(seed, augment.AUDIO_STREAM)
            wave = augment.augment_audio(wave, config.sampling_rate, self._augmentation, random)
        return to_int16(wave[: max_samples(config)])

    def _stack(self, decoded: Sequence[_Decoded], bad: Iterable[int]) -> Block:
        image, size = self._config.image, len(decoded)
        # Without a fixed size any image takes whole cells, so that an empty batch still has the shape of an image.
        patches = image.max_patches if image.size is not None else image.pooling**2
        patches = max([patches, *(len(item.patches) for item in decoded if item.patches is not None)])
        samples = max([1, *(len(item.wave) for item in decoded if item.wave is not None)])
        tokens = max([1, *(len(item.ids) for item in decoded if item.ids)])
        block = allocate(
            {
                "image": (torch.uint8, (size, patches, 3 * image.patch_size**2)),
                "image_position": (torch.int64, (size, patches, 2)),
                "audio": (torch.int16, (size, samples)),
                "audio_length": (torch.int64, (size,)),
                "text": (torch.int64, (size, tokens)),
                "text_length": (torch.int64, (size,)),
                "weight": (torch.float32, (size,)),
                "label": (torch.int64, (size,)),
            }
        )
        arrays = block.arrays()
        arrays["image_position"].fill(-1)
        arrays["weight"].fill(1)
        arrays["weight"][list(bad)] = 0
        arrays["label"][:] = [item.label for item in decoded]
        for place, item in enumerate(decoded):
            if item.patches is not None and item.positions is not None:
                arrays["image"][place, : len(item.patches)] = item.patches
                arrays["image_position"][place, : len(item.positions)] = item.positions
            if item.wave is not None:
                arrays["audio"][place, : len(item.wave)] = item.wave
                arrays["audio_length"][place] = len(item.wave)
            if item.ids:
                arrays["text"][place, : len(item.ids)] = item.ids
                arrays["text_length"][place] = len(item.ids)
        return block


class _BadMember(Exception):
    """A sample that becomes a placeholder: the member's name, and what is wrong with it."""

    def __init__(self, member: str | None, fault: DecodeError) -> None:
        super().__init__(member)
        self.member = member
        self.fault = fault


def _extension(raw: RawSample, member: str) -> str:
    return {"image": raw.image_extension, "audio": raw.audio_extension, "text": "txt"}.get(member, member)


def _label(metadata: dict[str, Any]) -> int:
    label = metadata.get("label")
    usable = isinstance(label, int) and not isinstance(label, bool) and -(1 << 63) <= label < 1 << 63
    return label if usable and isinstance(label, int) else -1
