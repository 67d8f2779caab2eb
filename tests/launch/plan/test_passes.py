"""The model on shapes alone is the model: FLOPs and kept activations are those of a real pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from launch.plan.passes import ShapeModel, Work
from launch.plan.trace import CPU_ATTENTION
from pretrain.config import Config
from pretrain.features import FRAME_MULTIPLE, num_frames
from pretrain.model.omni import OmniPretrainer
from pretrain.objectives import joint
from pretrain.objectives.align import align_loss
from tests.pretrain.tiny import batch_of, sample, tiny_config, word_tokenizer


def the_batch() -> dict[str, Any]:
    """Eight samples, of which some lack an image, a sound or a text."""
    return batch_of([sample(i, image=i != 1, audio=i != 2, text=i != 3) for i in range(8)])


def work_of(config: Config, batch: dict[str, Any], plan: Any) -> Work:
    frames = int(num_frames(batch["audio_length"], config.data.audio).max())
    return Work.of(batch, plan, -(-frames // FRAME_MULTIPLE) * FRAME_MULTIPLE)


@pytest.fixture(scope="module")
def shapes() -> ShapeModel:
    return ShapeModel(tiny_config(), word_tokenizer(), world_size=1)


def real_step(config: Config) -> tuple[int, int]:
    """FLOPs of a real forward and backward pass, and bytes that autograd keeps for the backward pass."""
    model = OmniPretrainer.build(config, word_tokenizer()).train()
    batch = the_batch()
    plan = model.plan(batch)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    flop_registry.update(CPU_ATTENTION)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(batch, plan)
            align, _ = align_loss(output.embeddings, config.objectives)
        sums = {"text": output.text, "image": output.image, "audio": output.audio, "align": align}
        joint.weighted_sum(sums, dict.fromkeys(joint.NAMES, 1), config.losses).backward()
    return counter.get_total_flops(), sum(kept.values())


def test_flops_and_kept_activations_are_those_of_a_real_pass(shapes: ShapeModel) -> None:
    config = tiny_config()
    flops, kept = real_step(config)
    batch = the_batch()
    plan = shapes.model.plan(batch)
    passed = shapes.run(batch, plan, work_of(config, batch, plan), cached_alignment=False)
    assert passed.flops == flops
    # Beside what autograd keeps, outputs and the inputs' copies are alive.
    assert kept <= sum(passed.kept_bytes.values()) * 1.02
    assert sum(passed.kept_bytes.values()) <= kept * 1.10
    assert passed.flops_of(passed.work) == pytest.approx(flops)


def test_every_gradient_is_handed_over_and_nothing_stays(shapes: ShapeModel) -> None:
    batch = the_batch()
    plan = shapes.model.plan(batch)
    before = shapes.live_bytes
    passed = shapes.run(batch, plan, work_of(tiny_config(), batch, plan), cached_alignment=False)
    assert passed.moments[0][0] == 0
    # What this batch has no use for, as a mask's token, gets no gradient.
    assert passed.moments[-1][0] == pytest.approx(sum(each.numel() for each in shapes.model.parameters()), rel=1e-3)
    assert shapes.live_bytes == before
    assert max(live for _, live in passed.moments) == passed.peak_bytes > sum(passed.kept_bytes.values()) * 0.9


def test_recomputing_keeps_less_and_computes_more() -> None:
    model = ShapeModel(tiny_config(), word_tokenizer(), world_size=2)
    batch = the_batch()
    plan = model.model.plan(batch)
    work = work_of(tiny_config(), batch, plan)
    kept = model.run(batch, plan, work, cached_alignment=False)
    model.checkpointing(True)
    recomputed = model.run(batch, plan, work, cached_alignment=False)
    assert recomputed.kept_bytes["text"] < kept.kept_bytes["text"] / 3
    assert recomputed.flops > kept.flops * 1.1
    model.checkpointing(False)
    assert model.run(batch, plan, work, cached_alignment=False) == kept


def test_the_contrastive_loss_grows_with_the_world() -> None:
    config = tiny_config()
    few, many = (ShapeModel(config, word_tokenizer(), world).alignment_bytes(32) for world in (2, 64))
    scores = 6 * 32 * 32 * 4
    assert many - few > (64 - 2) * scores


def test_bf16_activations_take_about_half() -> None:
    batch = the_batch()
    sizes = []
    for precision in ("fp32", "bf16"):
        config = tiny_config(engine={"precision": precision, "zero_stage": 2})
        model = ShapeModel(config, word_tokenizer(), world_size=1)
        plan = model.model.plan(batch)
        sizes.append(model.run(batch, plan, work_of(config, batch, plan), cached_alignment=False).peak_bytes)
    # Norms and the audio tower's attention compute in fp32 all the same.
    assert 0.45 < sizes[1] / sizes[0] < 0.95
