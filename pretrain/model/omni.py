"""`OmniPretrainer`: a native transformers backbone, the pretraining heads, and one forward pass for all losses.

One step runs each tower once, embeds token ids once and calls the language model once, on packed rows. Every module
is called the same number of times in the same order on every rank, whatever modalities that rank holds: where a rank
has no image or no sound its tower runs on one noise dummy whose outputs go nowhere, and the dummy's zero-weighted sum
keeps the gradient (and so ZeRO's collectives) in step. Losses come out as sums; the caller divides by global counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from data_pipelines.config import AudioConfig, AugmentConfig, ImageConfig
from pretrain.config import Config
from pretrain.features import FRAME_MULTIPLE, augment_mel, log_mel, num_frames
from pretrain.model import backbones
from pretrain.model.heads import Heads
from pretrain.model.presets import PRESETS
from pretrain.model.segments import PackedRows, SpecialTokens, build_rows, prompt
from pretrain.objectives import masking
from pretrain.objectives.align import Embeddings

_DROP_IMAGE, _DROP_AUDIO = 1, 2


@dataclass(frozen=True)
class Plan:
    """What one micro-batch will do, known before the forward pass: rows, masks, and what each loss averages over."""

    rows: PackedRows
    image_index: Tensor
    """int64 [N], the samples with an image (one dummy, -1, if none)."""
    audio_index: Tensor
    image_mask: Tensor
    """bool [N, P], patches to hide and reconstruct."""
    audio_mask: Tensor
    """bool [N', ceil(F / 4)], audio tokens to hide and reconstruct."""
    counts: dict[str, int]
    """Local counts: text tokens, masked patches and masked audio tokens."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the language model reads or predicts, padding not counted."""
        return len(self.rows.targets) + len(self.rows.image_slots) + len(self.rows.audio_slots)


@dataclass(frozen=True)
class Output:
    """Local sums of the losses and the embeddings of one micro-batch."""

    text: Tensor
    image: Tensor
    audio: Tensor
    embeddings: Embeddings
    text_per_sample: Tensor
    """float32 [B], summed negative log likelihood of each sample's conditioned and plain captions (no gradient)."""


class OmniPretrainer(nn.Module):
    """See the module's text. Parameters named `backbone.*` are the exported artifact, `heads.*` are not."""

    def __init__(self, backbone: nn.Module, heads: Heads, config: Config, special: SpecialTokens) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.config = config
        self.special = special
        self.family = backbones.family(config.model.family)
        if config.model.gradient_checkpointing:
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    @classmethod
    def build(cls, config: Config, tokenizer: PreTrainedTokenizerBase) -> OmniPretrainer:
        """A model of `config`, fresh from its seed or from `model.init_from`; fp32, on the CPU.

        The weights depend on the seed alone, never on the ZeRO stage or the world size.
        """
        family = backbones.family(config.model.family)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            if config.model.init_from is None:
                native = family.make_config(config.model, config.data, tokenizer)
                backbone = family.from_config(native, config.model.attention)
            else:
                backbone = family.from_pretrained(config.model.init_from, config.model.attention)
            heads = make_heads(config, backbone.config)
        return cls(backbone, heads, config, special_tokens(tokenizer))

    @property
    def embedding_size(self) -> int:
        """Size of the joint embedding."""
        return self.heads.image_readout.projection.out_features

    @property
    def image_config(self) -> ImageConfig:
        """Geometry of the images."""
        return self.config.data.image

    @property
    def audio_config(self) -> AudioConfig:
        """Rates and filters of the sounds."""
        return self.config.data.audio

    def image_soft_tokens(self, image_position: Tensor) -> Tensor:
        """Language-model tokens of each image: int64 [B, P, 2] -> int64 [B]."""
        return (image_position != -1).all(-1).sum(-1) // self.image_config.pooling**2

    def audio_soft_tokens(self, audio_length: Tensor) -> Tensor:
        """Language-model tokens of each sound: int64 [B] samples -> int64 [B]."""
        stride = self.family.AUDIO_STRIDE
        return -(-num_frames(audio_length, self.audio_config) // stride)

    def prompt_ids(self, num_image_tokens: int, num_audio_tokens: int) -> list[int]:
        """The ids that a caption follows."""
        return prompt(self.special, num_image_tokens, num_audio_tokens)

    def plan(self, batch: dict[str, Any], see: tuple[str, ...] | None = None) -> Plan:
        """Lay out one micro-batch (CPU tensors, see the loader's batch contract).

        Args:
            batch: a batch of the loader.
            see: modalities that the caption may see; null is training: modality dropout, and masks on inputs.
        """
        training = see is None
        objectives = self.config.objectives
        seed, weight = batch["seed"], batch["weight"] > 0
        num_image = torch.where(weight, self.image_soft_tokens(batch["image_position"]), 0)
        num_audio = torch.where(weight, self.audio_soft_tokens(batch["audio_length"]), 0)
        if see is None:
            show_image = masking.chance(seed, _DROP_IMAGE, 1 - objectives.drop_image)
            show_audio = masking.chance(seed, _DROP_AUDIO, 1 - objectives.drop_audio)
        else:
            show_image = torch.full_like(weight, "image" in see)
            show_audio = torch.full_like(weight, "audio" in see)
        image_index, audio_index = _present(num_image), _present(num_audio)
        rows = build_rows(
            batch["text"],
            torch.where(weight, batch["text_length"], 0),
            # Soft tokens are numbered within the towers' outputs, where only present samples are.
            num_image.numpy().astype(np.int64),
            num_audio.numpy().astype(np.int64),
            show_image.numpy(),
            show_audio.numpy(),
            self.special,
            self.config.data.pack_tokens,
            plain=training,
        )
        image_seed, audio_seed = seed[image_index.clamp(min=0)], seed[audio_index.clamp(min=0)]
        patch_valid = (batch["image_position"] != -1).all(-1)[image_index.clamp(min=0)] & (image_index >= 0)[:, None]
        token_count = torch.where(audio_index >= 0, num_audio[audio_index.clamp(min=0)], 0)
        share_image = (objectives.image_mask_chance, objectives.image_mask_share) if training else (0.0, 0.0)
        share_audio = (objectives.audio_mask_chance, objectives.audio_mask_share) if training else (0.0, 0.0)
        image_mask = masking.patches(image_seed, patch_valid, *share_image)
        audio_mask = masking.tokens(audio_seed, token_count, *share_audio)
        return Plan(
            rows=rows,
            image_index=image_index,
            audio_index=audio_index,
            image_mask=image_mask,
            audio_mask=audio_mask,
            counts={
                "text": len(rows.targets),
                "image": int(image_mask.sum()),
                "audio": int(audio_mask.sum()),
            },
        )

    def forward(self, batch: dict[str, Any], plan: Plan) -> Output:
        """Loss sums and embeddings of one micro-batch. `batch` and `plan` are CPU tensors; this moves them."""
        device, _ = self._device_and_dtype()
        augment = self.config.data.augment if self.training else None
        size = len(batch["keys"])
        image_features, image_soft, image_loss = self._image(batch, plan, device)
        audio_features, audio_soft, audio_loss = self._audio(batch, plan, device, augment)
        rows = plan.rows.to(device)
        hidden = self._language(rows, image_soft, audio_soft)
        text_loss, per_sample = self._text_loss(hidden, rows, size)

        readouts = {
            "image": (image_features, plan.image_index.to(device)),
            "audio": (audio_features, plan.audio_index.to(device)),
            "text": (self._text_readout(hidden, rows), rows.readout_sample),
        }
        vectors, present = {}, {}
        for name, (found, index) in readouts.items():
            vectors[name], present[name] = _scatter(found, index, size)
        scale, bias = self.heads.similarity()
        return Output(
            text=text_loss,
            image=image_loss,
            audio=audio_loss,
            embeddings=Embeddings(vectors, present, scale, bias),
            text_per_sample=per_sample,
        )

    def encode_image(self, image: Tensor, image_position: Tensor) -> Tensor:
        """Joint embedding of images: uint8 [B, P, C], int64 [B, P, 2] -> float32 [B, E] of norm 1."""
        device, dtype = self._device_and_dtype()
        pixels = image.to(device).to(dtype) / 255
        position = image_position.to(device)
        patches, _ = self.family.image_tower(self.backbone, pixels, position)
        return self.heads.image_readout(patches, (position != -1).all(-1))

    def encode_audio(self, audio: Tensor, audio_length: Tensor) -> Tensor:
        """Joint embedding of sounds: int16 [B, T], int64 [B] samples -> float32 [B, E] of norm 1."""
        device, dtype = self._device_and_dtype()
        mel, mask = log_mel(audio.to(device), audio_length.to(device), self.audio_config)
        features, valid, _ = self.family.audio_tower(self.backbone, mel.to(dtype), mask)
        return self.heads.audio_readout(features, valid)

    def encode_text(self, ids: Tensor, length: Tensor) -> Tensor:
        """Joint embedding of texts: int64 [B, L] without BOS and EOS, int64 [B] -> float32 [B, E] of norm 1."""
        device, _ = self._device_and_dtype()
        none = np.zeros(len(ids), dtype=np.int64)
        hide = np.zeros(len(ids), dtype=bool)
        rows = build_rows(ids, length, none, none, hide, hide, self.special, self.config.data.pack_tokens).to(device)
        embeds = self.family.embed(self.backbone, rows.ids)
        hidden = self.family.language_model(self.backbone, embeds, rows.position)
        found = self._text_readout(hidden, rows)
        return _scatter(found, rows.readout_sample, len(ids))[0]

    def caption_nll(self, batch: dict[str, Any], see: tuple[str, ...] = ("image", "audio")) -> tuple[Tensor, Tensor]:
        """Negative log likelihood of each caption with its EOS, given what is there of `see`.

        Returns:
            float32 [B] nats summed over tokens, and int64 [B] tokens (0 without text).
        """
        output_sum = self(batch, self.plan(batch, see)).text_per_sample
        length = torch.where((batch["weight"] > 0) & (batch["text_length"] > 0), batch["text_length"] + 1, 0)
        return output_sum, length.to(output_sum.device)

    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        parameter = next(self.heads.parameters())
        return parameter.device, parameter.dtype

    def _image(self, batch: dict[str, Any], plan: Plan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        _, dtype = self._device_and_dtype()
        if plan.image_index[0] < 0:
            pixels, position = self._dummy_image(device)
        else:
            pixels = batch["image"][plan.image_index].to(device, non_blocking=True).float() / 255
            position = batch["image_position"][plan.image_index].to(device, non_blocking=True)
        mask = plan.image_mask[:, : pixels.shape[1]].to(device)
        shown = self.heads.image_mask(pixels.to(dtype), mask)
        features, soft = self.family.image_tower(self.backbone, shown, position)
        guess = self.heads.image_reconstruction(features)
        loss = masking.patch_loss(guess, pixels, mask)
        return self.heads.image_readout(features, (position != -1).all(-1)), soft, loss

    def _audio(
        self, batch: dict[str, Any], plan: Plan, device: torch.device, augment: AugmentConfig | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, dtype = self._device_and_dtype()
        stride = self.family.AUDIO_STRIDE
        if plan.audio_index[0] < 0:
            mel, valid_frames = self._dummy_mel(device)
        else:
            length = batch["audio_length"][plan.audio_index]
            samples = batch["audio"][plan.audio_index][:, : int(length.max())]
            mel, valid_frames = log_mel(samples.to(device, non_blocking=True), length.to(device), self.audio_config)
            if augment is not None:
                mel = augment_mel(mel, valid_frames, batch["seed"][plan.audio_index].to(device), augment)
        tokens = -(-mel.shape[1] // stride)
        mask = nn.functional.pad(plan.audio_mask, (0, tokens - plan.audio_mask.shape[1])).to(device)
        hidden_frames = mask.repeat_interleave(stride, dim=1)[:, : mel.shape[1]]
        shown = self.heads.audio_mask(mel.to(dtype), hidden_frames)
        features, valid, soft = self.family.audio_tower(self.backbone, shown, valid_frames)
        guess = self.heads.audio_reconstruction(features)
        target = nn.functional.pad(mel, (0, 0, 0, tokens * stride - mel.shape[1])).reshape(len(mel), tokens, -1)
        frame_valid = nn.functional.pad(valid_frames, (0, tokens * stride - mel.shape[1]))
        loss = masking.frame_loss(guess, target, mask, frame_valid.reshape(len(mel), tokens, stride))
        return self.heads.audio_readout(features, valid), soft, loss

    def _language(self, rows: PackedRows, image_soft: Tensor, audio_soft: Tensor) -> Tensor:
        embeds = self.family.embed(self.backbone, rows.ids)
        flat = embeds.reshape(-1, embeds.shape[-1])
        flat = flat.index_copy(0, rows.image_slots, image_soft[rows.image_source].to(flat.dtype))
        flat = flat.index_copy(0, rows.audio_slots, audio_soft[rows.audio_source].to(flat.dtype))
        # Unused soft tokens (dropped modalities, dummies) stay in the graph with weight zero, on every rank alike.
        flat = flat + 0.0 * (image_soft.sum() + audio_soft.sum()).to(flat.dtype)
        return self.family.language_model(self.backbone, flat.view_as(embeds), rows.position)

    def _text_loss(self, hidden: Tensor, rows: PackedRows, size: int) -> tuple[Tensor, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        slots = rows.target_slots if len(rows.target_slots) else rows.target_slots.new_zeros(1)
        scores = self.family.logits(self.backbone, flat[slots]).float()
        if not len(rows.target_slots):
            return 0.0 * scores.sum(), scores.new_zeros(size)
        nll = nn.functional.cross_entropy(scores, rows.targets, reduction="none")
        per_sample = scores.new_zeros(size).index_add(0, rows.target_sample, nll.detach())
        return nll.sum(), per_sample

    def _text_readout(self, hidden: Tensor, rows: PackedRows) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        slots = rows.readout_slots if len(rows.readout_slots) else rows.readout_slots.new_zeros(1)
        found = flat[slots][:, None]
        return self.heads.text_readout(found, torch.ones(found.shape[:2], dtype=torch.bool, device=found.device))

    def _dummy_image(self, device: torch.device) -> tuple[Tensor, Tensor]:
        image = self.image_config
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(1, image.pooling**2, 3 * image.patch_size**2, generator=generator)
        grid = torch.arange(image.pooling)
        position = torch.stack([grid.repeat(image.pooling), grid.repeat_interleave(image.pooling)], dim=-1)[None]
        return pixels.to(device), position.to(device)

    def _dummy_mel(self, device: torch.device) -> tuple[Tensor, Tensor]:
        frames = FRAME_MULTIPLE
        generator = torch.Generator().manual_seed(0)
        mel = torch.randn(1, frames, self.audio_config.mel_bins, generator=generator)
        return mel.to(device), torch.ones(1, frames, dtype=torch.bool, device=device)


def make_heads(config: Config, native: Any) -> Heads:
    """Fresh heads for a native config, drawn from torch's global generator."""
    family = backbones.family(config.model.family)
    text, vision, audio = family.sizes(native)
    siglip = config.objectives.align == "siglip"
    return Heads(
        text=text,
        vision=vision,
        audio=audio,
        embedding=config.model.embedding_size or PRESETS[config.model.preset].embedding_size,
        patch=3 * config.data.image.patch_size**2,
        frames=family.AUDIO_STRIDE * config.data.audio.mel_bins,
        logit_scale=config.objectives.logit_scale,
        logit_bias=-10.0 if siglip else 0.0,
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The framing ids of a tokenizer."""
    return SpecialTokens(
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        image=tokenizer.image_token_id,
        boi=tokenizer.boi_token_id,
        eoi=tokenizer.eoi_token_id,
        audio=tokenizer.audio_token_id,
        boa=tokenizer.boa_token_id,
        eoa=tokenizer.eoa_token_id,
    )


def _present(num_tokens: Tensor) -> Tensor:
    index = torch.nonzero(num_tokens > 0).flatten()
    return index if len(index) else torch.full((1,), -1, dtype=torch.int64)


def _scatter(found: Tensor, index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Put rows at their samples: [N, E] and int64 [N] (-1 = dummy) -> [size, E], bool [size]; dummies weigh zero."""
    real = index >= 0
    full = found.new_zeros(size, found.shape[-1])
    present = torch.zeros(size, dtype=torch.bool, device=found.device)
    if len(index):
        full = full.index_add(0, index.clamp(min=0), found[: len(index)] * real[:, None])
        present[index[real]] = True
    return full + 0.0 * found.sum(), present
