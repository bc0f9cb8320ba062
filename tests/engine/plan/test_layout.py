"""Test estimates by the roofline, and which layouts are possible."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quire.engine.errors import ConfigurationError
from quire.engine.plan.layout import Hardware, Layout, layouts_of
from quire.engine.plan.roofline import GPUS, EstimatedTimes, ModelShape, gpu_named, num_blocks
from quire.engine.plan.step_times import StepShape

from .models import shape

EIGHT_B = ModelShape(
    num_parameters=8_000_000_000,
    weight_bytes=16_000_000_000,
    kv_bytes_per_token=131_072,
    num_layers=32,
    num_places=32,
    hidden_size=4096,
    num_kv_heads=8,
    num_attention_heads=32,
)
DECODE = StepShape(tokens=32, rows=32, context=32 * 1000, pairs=0)
PREFILL = StepShape(tokens=8192, rows=1, context=0, pairs=8192 * 8193 // 2)


def seconds(gpu: str, step: StepShape, tp: int = 1) -> float:
    return sum(EstimatedTimes(EIGHT_B, GPUS[gpu], tp).parts(step).values())


def test_estimates_are_near_what_is_known_of_an_8b_model_on_an_h100() -> None:
    """Its weights take 16 GB / 3.35 TB/s = 4.8 ms at best, its products 16 GFLOP a token."""
    assert 0.006 < seconds("H100", DECODE) < 0.012
    assert 30e-6 < seconds("H100", PREFILL) / 8192 < 50e-6


def test_faster_memory_and_more_gpus_help_as_far_as_they_can() -> None:
    assert seconds("H200", DECODE) < 0.8 * seconds("H100", DECODE)
    assert seconds("H200", PREFILL) == pytest.approx(seconds("H100", PREFILL), rel=0.1)
    for step in (DECODE, PREFILL):
        assert seconds("H100", step) / 2 < seconds("H100", step, 2) < seconds("H100", step)
    tiny = replace(EIGHT_B, num_parameters=10**8, weight_bytes=2 * 10**8)
    one, two = (EstimatedTimes(tiny, GPUS["H100"], tp).parts(DECODE) for tp in (1, 2))
    assert sum(two.values()) > sum(one.values())  # all-reduces cost more than they save


def test_blocks_are_what_the_weights_leave() -> None:
    blocks = num_blocks(EIGHT_B, GPUS["H100"], 1, 16)
    assert blocks * 16 * 131_072 == pytest.approx(80e9 * 0.9 - 16e9 - 2**31, rel=0.01)
    assert num_blocks(EIGHT_B, GPUS["H100"], 2, 16) > 2 * blocks
    one_head = replace(EIGHT_B, num_kv_heads=1)  # K and V are on both GPUs
    assert num_blocks(one_head, GPUS["H100"], 2, 16) < 1.3 * blocks
    assert num_blocks(EIGHT_B, GPUS["L4"], 1, 16) < 3000


@pytest.mark.parametrize(("text", "layout"), [("2x4", (2, 4)), ("1×1", (1, 1)), (" 8 X 2", (8, 2))])
def test_layouts_are_read(text: str, layout: tuple[int, int]) -> None:
    assert Layout.read(text) == layout and Layout.read(text).gpus == layout[0] * layout[1]


@pytest.mark.parametrize("text", ["", "4", "2x", "ax2", "0x4", "2x0", "2x2x2", "-1x2"])
def test_other_texts_are_no_layouts(text: str) -> None:
    with pytest.raises(ConfigurationError, match="a layout"):
        Layout.read(text)


def test_layouts_of_so_many_gpus() -> None:
    assert [str(one) for one in layouts_of(8)] == ["1 × 8", "2 × 4", "4 × 2", "8 × 1"]
    assert [str(one) for one in layouts_of(6)] == ["1 × 6", "2 × 3"]
    assert [str(one) for one in layouts_of(4, max_tp=1)] == ["1 × 4"]


def test_what_is_not_possible_is_refused_with_the_reason() -> None:
    model = replace(EIGHT_B, num_attention_heads=6, num_kv_heads=2)
    hardware = Hardware(shape=shape(), model=model, gpu=GPUS["H100"])
    with pytest.raises(ConfigurationError, match=r"cannot be divided by 4: .* among 1, 2"):
        hardware.engine(4)
    small = Hardware(shape=shape(max_model_len=100_000), model=EIGHT_B, gpu=GPUS["L4"])
    with pytest.raises(ConfigurationError, match="on 1 GPU the weights leave room for"):
        small.engine(1)
    assert small.engine(4).shape.num_blocks * 16 > 100_000
    with pytest.raises(ConfigurationError, match="size of 2 was not measured: give --gpu"):
        Hardware(shape=shape()).engine(2)
    with pytest.raises(ConfigurationError, match="unknown GPU 'H900': choose from A10, "):
        gpu_named("H900")
    assert gpu_named("h100") is GPUS["H100"]
