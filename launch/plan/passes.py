"""A micro-batch through the model, forward and backward, on shapes alone: its memory over time, and FLOPs by part."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from data_pipelines.errors import BadInput
from launch.plan.trace import Shapes
from pretrain.config import Config
from pretrain.model import backbones
from pretrain.model.omni import OmniPretrainer, Plan, make_heads, special_tokens
from pretrain.objectives import joint
from pretrain.objectives.align import Embeddings, align_loss

PARTS = ("vision", "audio", "text", "logits", "alignment")
"""Where activations and FLOPs arise: the towers, the language model, its logits, read-outs and contrastive loss."""
_METHODS = {"_image": "vision", "_audio": "audio", "_language": "text", "_text_loss": "logits"}


@dataclass(frozen=True)
class Work:
    """How much one micro-batch has of each part's unit, padding included."""

    vision: int
    """Patches."""
    audio: int
    """Mel frames."""
    text: int
    """Slots of packed rows."""
    logits: int
    """Predicted tokens."""
    alignment: int
    """Samples."""

    @classmethod
    def of(cls, batch: dict[str, Any], plan: Plan, frames: int) -> Work:
        """The work of a micro-batch whose longest sound has `frames` mel frames."""
        return cls(
            vision=len(plan.image_index) * int(batch["image_position"].shape[1]),
            audio=len(plan.audio_index) * frames,
            text=plan.rows.ids.numel(),
            logits=len(plan.rows.targets),
            alignment=len(batch["keys"]),
        )


@dataclass(frozen=True)
class Pass:
    """What one micro-batch takes."""

    work: Work
    kept_bytes: dict[str, int]
    """By part, what its forward pass keeps for the backward pass."""
    moments: tuple[tuple[int, int], ...]
    """(gradients handed over so far, in elements; most bytes alive meanwhile beside the weights and these), in order.

    A gradient counts as alive until it is whole, and is handed to ZeRO then.
    """
    mapped_moments: tuple[tuple[int, int], ...]
    """The same of storages above `HEAP_BLOCK_BYTES` alone."""
    heap_moments: tuple[tuple[int, int], ...]
    """The same of smaller ones."""
    forward_flops: dict[str, int]
    """By part."""
    flops: int
    """Forward and backward, recomputation included."""

    @property
    def peak_bytes(self) -> int:
        """Most bytes of activations at any time."""
        return max(live for _, live in self.moments)

    def scaled(self, factor: float) -> Pass:
        """With so many times the activations."""

        def times(moments: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
            return tuple((done, int(live * factor)) for done, live in moments)

        return replace(
            self,
            kept_bytes={part: int(size * factor) for part, size in self.kept_bytes.items()},
            moments=times(self.moments),
            mapped_moments=times(self.mapped_moments),
            heap_moments=times(self.heap_moments),
        )

    def flops_of(self, work: Work) -> float:
        """FLOPs of another micro-batch, each part's by its unit."""
        return self.forward_flops_of(work) * self.flops / max(1, sum(self.forward_flops.values()))

    def forward_flops_of(self, work: Work) -> float:
        """The same of a forward pass alone."""
        return float(
            sum(
                flops * getattr(work, part) / max(1, getattr(self.work, part))
                for part, flops in self.forward_flops.items()
            )
        )


class ShapeModel:
    """The model of a config without numbers, to be run on micro-batches of any size."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, world_size: int) -> None:
        self.config = config
        self._world_size = world_size
        self._shapes = Shapes()
        with self._shapes:
            self.model = _build(config, tokenizer)
            if config.engine.precision == "bf16":
                _to_bf16(self.model)
        self.model.train()

    @property
    def live_bytes(self) -> int:
        """What is alive now: between passes, the weights."""
        return self._shapes.live_bytes

    def checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass, or keep them."""
        backbone: Any = self.model.backbone
        if on:
            with warnings.catch_warnings():
                # Of a new name that older transformers do not have.
                warnings.simplefilter("ignore", FutureWarning)
                backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            backbone.gradient_checkpointing_disable()

    def run(self, batch: dict[str, Any], plan: Plan, work: Work, cached_alignment: bool) -> Pass:
        """One micro-batch forward and backward.

        Args:
            batch: as the loader makes it, `image` and `audio` left out.
            plan: the model's for it.
            work: its work.
            cached_alignment: whether the contrastive loss is that of several micro-batches, whose gradient is cached.
        """
        shapes, model, config = self._shapes, self.model, self.config
        batch = batch | {
            "image": shapes.fake(
                *batch["image_position"].shape[:2], 3 * config.data.image.patch_size**2, dtype=torch.uint8
            ),
            "audio": shapes.fake(len(batch["keys"]), max(1, int(batch["audio_length"].max())), dtype=torch.int16),
        }
        base, base_heap, base_flops, done = shapes.live_bytes, shapes.heap_bytes, shapes.flops, 0
        moments: dict[int, int] = {}
        mapped: dict[int, int] = {}
        heap: dict[int, int] = {}

        def see() -> None:
            in_heap = shapes.heap_bytes - base_heap
            moments[done] = max(moments.get(done, 0), shapes.live_bytes - base)
            mapped[done] = max(mapped.get(done, 0), shapes.live_bytes - base - in_heap)
            heap[done] = max(heap.get(done, 0), in_heap)

        def hand_over(parameter: Tensor) -> None:
            nonlocal done
            parameter.grad = None
            done += parameter.numel()

        hooks = [_when_whole(parameter, hand_over) for parameter in model.parameters()]
        kept, forward = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
        shapes.after_each = see
        try:
            with shapes, _marked(model, shapes, kept, forward):
                bytes_before, flops_before = shapes.live_bytes, shapes.flops
                output = model(batch, plan)
                if cached_alignment:
                    align = torch.stack([vector.sum() for vector in output.embeddings.vectors.values()]).sum()
                else:
                    align, _ = align_loss(output.embeddings, config.objectives, self._gather)
                sums = {"text": output.text, "image": output.image, "audio": output.audio, "align": align}
                loss = joint.weighted_sum(sums, dict.fromkeys(joint.NAMES, 1), config.losses)
                kept["alignment"] = shapes.live_bytes - bytes_before - sum(kept.values())
                forward["alignment"] = shapes.flops - flops_before - sum(forward.values())
                loss.backward()  # type: ignore[no-untyped-call]
                del output, align, sums, loss
        finally:
            shapes.after_each = lambda: None
            for hook in hooks:
                hook.remove()
        return Pass(
            work=work,
            kept_bytes=kept,
            moments=tuple(sorted(moments.items())),
            mapped_moments=tuple(sorted(mapped.items())),
            heap_moments=tuple(sorted(heap.items())),
            forward_flops=forward,
            flops=shapes.flops - base_flops,
        )

    def alignment_bytes(self, share: int) -> int:
        """Most bytes of the contrastive loss of a rank's whole share on its own, with its gradient."""
        shapes, names = self._shapes, ("image", "text", "audio")
        base, most = shapes.live_bytes, 0

        def see() -> None:
            nonlocal most
            most = max(most, shapes.live_bytes - base)

        shapes.after_each = see
        try:
            with shapes:
                size = self.model.embedding_size
                vectors = {name: shapes.fake(share, size, dtype=torch.float32).requires_grad_() for name in names}
                one = shapes.fake(1, dtype=torch.float32).requires_grad_()
                present = {name: torch.ones(share, dtype=torch.bool) for name in names}
                loss, _ = align_loss(Embeddings(vectors, present, one, one), self.config.objectives, self._gather)
                loss.backward()  # type: ignore[no-untyped-call]
        finally:
            shapes.after_each = lambda: None
        return most

    def _gather(self, x: Tensor) -> Tensor:
        if self._world_size == 1:
            return x
        made: Tensor = _Gathered.apply(x, self._world_size)  # type: ignore[no-untyped-call]
        return made


def _when_whole(parameter: Tensor, run: Callable[[Tensor], None]) -> Any:
    return parameter.register_post_accumulate_grad_hook(run)  # type: ignore[no-untyped-call]


class _Gathered(torch.autograd.Function):
    """What `pretrain.objectives.align` allocates for a gather, without other ranks: each has what this one has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world_size: int) -> Tensor:
        ctx.world_size = world_size
        return torch.cat([x.clone() for _ in range(world_size)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.contiguous().chunk(ctx.world_size)[0], None


def _build(config: Config, tokenizer: PreTrainedTokenizerBase) -> OmniPretrainer:
    """As `OmniPretrainer.build`, but of a pretrained backbone its config alone is read."""
    if config.model.init_from is None:
        return OmniPretrainer.build(config, tokenizer)
    try:
        native = AutoConfig.from_pretrained(config.model.init_from, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"model.init_from: {' '.join(str(error).split())[:200]}") from None
    backbone = backbones.family(config.model.family).from_config(native, config.model.attention)
    return OmniPretrainer(backbone, make_heads(config, backbone.config), config, special_tokens(tokenizer))


class _marked:
    """While it holds, each part's method notes what it keeps and computes."""

    def __init__(self, model: Any, shapes: Shapes, kept: dict[str, int], flops: dict[str, int]) -> None:
        self._model, self._shapes, self._kept, self._flops = model, shapes, kept, flops

    def __enter__(self) -> None:
        for method, part in _METHODS.items():
            setattr(self._model, method, self._noting(getattr(self._model, method), part))

    def __exit__(self, *_: object) -> None:
        for method in _METHODS:
            delattr(self._model, method)

    def _noting(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            num_bytes, flops = self._shapes.live_bytes, self._shapes.flops
            out = method(*args)
            self._kept[part] += self._shapes.live_bytes - num_bytes
            self._flops[part] += self._shapes.flops - flops
            return out

        return run


def _to_bf16(model: nn.Module) -> None:
    """As DeepSpeed does it: weights and buffers; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made.setdefault(id(parameter), nn.Parameter(parameter.detach().to(torch.bfloat16)))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(torch.bfloat16)
