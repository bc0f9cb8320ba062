"""The CPU's kernels against torch, in each type that a model may have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from quire.engine.attention import AttentionMetadata
from quire.engine.attention_cpu import CpuOps, build_cpu_plan
from quire.engine.cpu_numbers import (
    PANEL_COLUMNS,
    PANEL_ROWS,
    as_array,
    exp,
    fetch_add,
    multiply_add,
    store,
    to_float,
)
from quire.engine.flat_decoder import FlatLayer, Norm, Rotation, TorchOps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
HEADS, KV_HEADS = 6, 2


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def make_layer(head_dim: int, qk_norm: Norm | None, *, is_silu: bool = True) -> FlatLayer:
    norm = Norm(torch.ones(1), 1e-6)
    activation = torch.nn.functional.silu if is_silu else torch.nn.functional.gelu
    return FlatLayer(
        layer_idx=0,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=head_dim,
        scale=0.3,
        window=None,
        input_norm=norm,
        qkv=identity,
        qk_norm=qk_norm,
        output=identity,
        mlp_norm=norm,
        gate_up=identity,
        activation=activation,
        is_silu=is_silu,
        down=identity,
    )


def make_metadata(slots: list[int], head_dim: int, dtype: torch.dtype) -> AttentionMetadata:
    """Every token is the only one of its sequence."""
    tokens = len(slots)
    loc = torch.arange(tokens + 1, dtype=torch.int32)
    seq_lens = torch.tensor([slot >= 0 for slot in slots], dtype=torch.int32)
    return AttentionMetadata(
        kv_cache=torch.zeros(1, 2, 8, KV_HEADS, 4, head_dim, dtype=dtype),
        slot_mapping=torch.tensor(slots),
        block_table=torch.tensor(slots, dtype=torch.int32)[:, None] // 4,
        query_start_loc=loc,
        seq_lens=seq_lens,
        num_decodes=tokens,
        max_query_len=1,
        workspaces={},
        cpu_plan=build_cpu_plan(loc.numpy(), seq_lens.numpy(), HEADS // KV_HEADS),
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the type's rounding of what float32 gives."""
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)


@njit
def round_trip(numbers, out):  # type: ignore[no-untyped-def]
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            store(out, row, column, to_float(numbers[row, column]))


@njit
def round_to(numbers, out):  # type: ignore[no-untyped-def]
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            store(out, row, column, numbers[row, column])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_numbers_of_sixteen_bits_come_back(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)
    out = torch.empty_like(numbers)
    round_trip(as_array(numbers), as_array(out))
    assert torch.equal(out.isnan(), numbers.isnan())
    real = ~numbers.isnan()
    assert torch.equal(out.view(torch.int16)[real], numbers.view(torch.int16)[real])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_is_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (512, 512), generator=torch.Generator().manual_seed(0))
    numbers = bits.to(torch.int32).view(torch.float32)
    ties = torch.arange(0x3F800000, 0x3F800000 + (1 << 18), 0x800, dtype=torch.int32)
    numbers.view(-1)[: len(ties)] = ties.view(torch.float32)
    out = torch.empty(numbers.shape, dtype=dtype)
    round_to(as_array(numbers), as_array(out))
    torch.testing.assert_close(out, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_the_exponential_is_as_exact_as_it_says() -> None:
    @njit
    def apply(numbers, out):  # type: ignore[no-untyped-def]
        for index in range(len(numbers)):
            out[index] = exp(numbers[index])

    numbers = np.linspace(-86, 86, 1_000_001, dtype=np.float32)
    out = np.empty_like(numbers)
    apply(numbers, out)
    expected = np.exp(numbers.astype(np.float64))
    assert np.abs(out / expected - 1).max() < 4e-6
    near = np.abs(numbers) < 1
    assert np.abs(out[near] / expected[near] - 1).max() < 3e-7
    extremes = np.array([-np.inf, -200, 200, np.nan], dtype=np.float32)
    out = np.empty_like(extremes)
    apply(extremes, out)
    assert out[0] == out[1] < 2e-38 and out[2] > 8e37 and np.isnan(out[3])


def test_a_panel_of_a_product() -> None:
    @njit
    def apply(left, right, depth, out):  # type: ignore[no-untyped-def]
        multiply_add(left, right, depth, out, PANEL_ROWS, PANEL_COLUMNS)

    rng = np.random.default_rng(0)
    left = rng.standard_normal((2 * PANEL_ROWS, 9), dtype=np.float32)
    right = rng.standard_normal((8, 3 * PANEL_COLUMNS), dtype=np.float32)
    out = np.ones((2 * PANEL_ROWS, 3 * PANEL_COLUMNS), dtype=np.float32)
    expected = out.copy()
    rows, columns = slice(PANEL_ROWS, None), slice(PANEL_COLUMNS, 2 * PANEL_COLUMNS)
    expected[rows, columns] += left[rows, :7] @ right[:7, columns]
    apply(left, right, 7, out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_a_counter_gives_every_number_once() -> None:
    counter = np.zeros(1, dtype=np.int64)

    @njit
    def take(counter):  # type: ignore[no-untyped-def]
        return fetch_add(counter, np.int64(2))

    assert [take(counter) for _ in range(3)] == [0, 2, 4] and counter[0] == 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 70])
def test_add_norm(tokens: int, dtype: torch.dtype) -> None:
    x, update = torch.randn(2, tokens, 50).to(dtype)
    norm = Norm(torch.randn(50).to(dtype), 1e-5)
    ops = CpuOps(make_metadata([0], 4, dtype))
    exact = Norm(norm.weight.float(), norm.eps)
    for this_update in (None, update):
        expected_x = x.float() if this_update is None else x.float() + update.float()
        actual = ops.add_norm(x, this_update, norm)
        assert_close(x, expected_x)
        assert_close(actual, exact(x.float()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_silu", [True, False])
def test_activate(is_silu: bool, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(5, 66) * 4).to(dtype)
    gate_up[0, :4] = torch.tensor([-90.0, 90.0, 0.0, torch.nan])
    layer = make_layer(4, None, is_silu=is_silu)
    actual = CpuOps(make_metadata([0], 4, dtype)).activate(layer, gate_up)
    expected = layer.activation(gate_up[:, :33].float()) * gate_up[:, 33:].float()
    assert actual[0, 3].isnan() and expected[0, 3].isnan()
    actual[0, 3] = expected[0, 3] = 0
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("head_dim", [4, 20, 64, 96])
def test_rotation_and_attention_are_those_of_plain_torch(
    head_dim: int, has_norm: bool, dtype: torch.dtype
) -> None:
    slots = [4, 0, -1, 28, 8]  # the first token of its sequence stands in the first slot of a block
    qkv = torch.randn(len(slots), (HEADS + 2 * KV_HEADS) * head_dim).to(dtype)
    angles = torch.rand(len(slots), head_dim // 2).repeat(1, 2) * 6
    sin = angles.sin()
    sin[:, : head_dim // 2] *= -1
    rotation = Rotation(angles.cos().to(dtype), sin.to(dtype))
    weight = torch.randn(HEADS + KV_HEADS, head_dim).to(dtype)
    metadata = make_metadata(slots, head_dim, dtype)
    layer = make_layer(head_dim, Norm(weight, 1e-6) if has_norm else None)
    actual = CpuOps(metadata).attend(layer, qkv, rotation)

    seen: list[torch.Tensor] = []

    def attention(_: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        seen.extend((key, value))
        return value.repeat_interleave(HEADS // KV_HEADS, dim=1)  # each token sees itself alone

    exact = make_layer(head_dim, Norm(weight.float(), 1e-6) if has_norm else None)
    exact_rotation = Rotation(*(part.float() for part in rotation))
    expected = TorchOps(attention).attend(exact, qkv.float(), exact_rotation)
    written = [row for row, slot in enumerate(slots) if slot >= 0]
    assert_close(actual[written], expected[written])
    cache = metadata.kv_cache[0].transpose(2, 3).reshape(2, 32, KV_HEADS, head_dim)
    scale = max(1.0, float(seen[0].abs().max()))
    for half, part in zip(cache, seen, strict=True):
        assert_close(half[[slots[row] for row in written]] / scale, part[written] / scale)
    untouched = [slot for slot in range(32) if slot not in slots]
    assert not cache[:, untouched].any()
