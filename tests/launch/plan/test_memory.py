"""ZeRO's arithmetic on a model of a million parameters, and the micro-batch that fits."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from launch.plan.memory import Layout, Parameters, RankMemory, largest_micro_batch, rank_memory
from launch.plan.passes import PARTS, Pass, Work

MILLION = 1_000_000
MODEL = Parameters({"text": MILLION}, (800_000, 200_000), 100_000)
PASS = Pass(
    work=Work(1, 1, 1, 1, 1),
    kept_bytes=dict.fromkeys(PARTS, 1_000_000),
    moments=((0, 9_000_000), (500_000, 8_000_000), (MILLION, 1_000_000)),
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
    large = Parameters({"text": 2_000 * MILLION}, (2_000 * MILLION,), MILLION)
    gathered = rank_memory(replace(GPU, zero_stage=3), large, PASS).device["gathered weights"]
    assert MILLION * 1000 <= gathered < 2 * 600 * MILLION


def test_offload_moves_the_optimizer_to_the_host() -> None:
    kept, moved = plan(), plan(offload_optimizer=True)
    assert moved.device["moments"] == moved.device["fp32 weights"] == 0
    assert moved.host > 12 * MILLION / 8 > kept.host == 0


def test_the_fullest_moment_follows_the_gradients() -> None:
    # Without ZeRO gradients pile up while activations go: the second moment is the fullest.
    before = plan(zero_stage=0, element_bytes=4)
    assert before.moment == "forward and backward"
    assert before.device["gradients"] == 4 * 500_000
    assert sum(before.device[part] for part in ("activations", "logits", "contrastive gather")) == 8_000_000


def test_every_layout_is_named_and_possible() -> None:
    layouts = GPU.others()
    assert len({layout.name for layout in layouts}) == len(layouts)
    assert all(layout.zero_stage == 3 for layout in layouts if layout.offload_parameters)
    assert all(layout.zero_stage for layout in layouts), "DeepSpeed has no bf16 without ZeRO"
    assert {layout.zero_stage for layout in replace(GPU, element_bytes=4, is_gpu=False).others()} == {0, 1, 2, 3}


@given(
    base=st.floats(1e6, 1e12),
    slope=st.floats(1e3, 1e10),
    sizes=st.tuples(st.integers(1, 64), st.integers(65, 256)),
    limit=st.floats(1e6, 2e12),
)
def test_the_largest_micro_batch_is_the_last_that_fits(
    base: float, slope: float, sizes: tuple[int, int], limit: float
) -> None:
    def line(size: int) -> float:
        return base + slope * size

    found = largest_micro_batch([(size, line(size)) for size in sizes], limit)
    slack = 1e-6 * (base + slope * 300 + limit)
    assert found >= 0
    if found:
        assert line(found) <= limit + slack
    assert line(found + 1) > limit - slack
