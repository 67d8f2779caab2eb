"""ZeRO's arithmetic on a model of a million parameters, and the micro-batch that fits."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from launch.plan.memory import HEAP_SLACK, Layout, Parameters, RankMemory, largest_micro_batch, rank_memory
from launch.plan.passes import PARTS, Pass, Work

MILLION = 1_000_000
MODEL = Parameters({"text": MILLION}, (800_000, 200_000), 100_000)
PASS = Pass(
    work=Work(1, 1, 1, 1, 1),
    kept_bytes=dict.fromkeys(PARTS, 1_000_000),
    moments=((0, 9_000_000), (500_000, 8_000_000), (MILLION, 1_000_000)),
    mapped_moments=((0, 4_000_000), (500_000, 4_000_000), (MILLION, 500_000)),
    heap_moments=((0, 5_000_000), (500_000, 4_000_000), (MILLION, 500_000)),
    forward_flops=dict.fromkeys(PARTS, 10),
    flops=150,
)
GPU = Layout(2, False, False, 8, 2, 50_000_000, 1, True)


def plan(**changes: object) -> RankMemory:
    return rank_memory(replace(GPU, **changes), MODEL, PASS)  # type: ignore[arg-type]


def test_state_is_divided_as_zero_says() -> None:
    # bf16 weights, fp32 weights and two moments: 2 + 4 + 8 bytes a parameter, cut where the stage cuts.
    for stage, weights, optimizer in ((1, 2, 12 / 8), (2, 2, 12 / 8), (3, 2 / 8, 12 / 8)):
        device = plan(zero_stage=stage).device
        assert device["weights"] == weights * MILLION
        assert device["fp32 weights"] + device["moments"] == optimizer * MILLION


def test_fp32_has_a_second_copy_of_the_weights_under_zero_1_and_2_alone() -> None:
    assert plan(zero_stage=2, element_bytes=4).device["fp32 weights"] == 4 * MILLION / 8
    assert plan(zero_stage=3, element_bytes=4).device["fp32 weights"] == 0
    assert plan(zero_stage=0, element_bytes=4).device["fp32 weights"] == 0


def test_a_small_model_stays_gathered_under_zero_3() -> None:
    assert plan(zero_stage=3).device["gathered weights"] == 2 * MILLION
    large = Parameters({"text": 2_000 * MILLION}, (10 * MILLION,) * 200, MILLION)
    gathered = rank_memory(replace(GPU, zero_stage=3), large, PASS).device["gathered weights"]
    assert MILLION * 1000 <= gathered < 2 * 600 * MILLION


def test_offload_moves_the_optimizer_to_the_host() -> None:
    kept, moved = plan(), plan(offload_optimizer=True)
    assert moved.device["moments"] == moved.device["fp32 weights"] == 0
    assert moved.host >= kept.host + 12 * MILLION / 8


def test_a_save_keeps_a_copy_in_host_memory() -> None:
    # Of rank 0, which saves the weights beside its share of fp32 weights and moments.
    assert plan().host == (2 + 12 / 8) * MILLION and plan().device["checkpoint copy"] == 0
    assert plan(zero_stage=3).host == 12 / 8 * MILLION
    on_cpu = plan(is_gpu=False, element_bytes=4)
    assert on_cpu.device["checkpoint copy"] == (4 + 12 / 8) * MILLION and on_cpu.host == 0


def test_the_fullest_moment_follows_the_gradients() -> None:
    # Without ZeRO gradients pile up while activations go: the second moment is the fullest.
    before = plan(zero_stage=0, element_bytes=4)
    assert before.moment == "forward and backward"
    assert before.device["gradients"] == 4 * 500_000
    assert sum(before.device[part] for part in ("activations", "logits", "contrastive gather")) == 8_000_000


def test_on_a_cpu_the_heap_stays_as_large_as_it_was() -> None:
    def on_cpu(stage: int) -> dict[str, float]:
        return plan(zero_stage=stage, element_bytes=4, is_gpu=False).device

    # Under ZeRO 2 a rank keeps an eighth of the gradients, and not among the activations.
    reduced = on_cpu(2)
    assert reduced["activations"] >= HEAP_SLACK * 5_000_000 - 2_000_000
    # Under ZeRO 1 they pile up where the activations go.
    assert on_cpu(1)["gradients"] >= 4 * MILLION


def test_every_layout_is_named_and_possible() -> None:
    layouts = GPU.others()
    assert len({layout.name for layout in layouts}) == len(layouts)
    assert all(layout.zero_stage == 3 for layout in layouts if layout.offload_parameters)
    assert all(layout.zero_stage for layout in layouts), "DeepSpeed has no bf16 without ZeRO"
    assert {layout.zero_stage for layout in replace(GPU, element_bytes=4, is_gpu=False).others()} == {0, 1, 2, 3}


@given(
    base=st.floats(1e6, 1e12),
    slope=st.floats(1e3, 1e10),
    several=st.floats(0, 1e10),
    share=st.integers(1, 256),
    limit=st.floats(1e6, 2e12),
)
def test_the_largest_micro_batch_is_the_last_that_fits(
    base: float, slope: float, several: float, share: int, limit: float
) -> None:
    def bytes_of(size: int) -> float:
        # Several micro-batches a step take more than one: gradients pile up.
        return base + slope * size + (several if size < share else 0.0)

    found = largest_micro_batch(bytes_of, share, limit)
    assert found < 1 << 20
    assert found == 0 or bytes_of(found) <= limit
    assert found == (1 << 20) - 1 or bytes_of(found + 1) > limit


def test_a_small_sample_fits_very_often() -> None:
    assert largest_micro_batch(lambda size: 1.0 * size, 64, 1000.0) == 1000
    assert largest_micro_batch(lambda size: 1.0, 64, 1000.0) >= 1 << 19
