"""Compare the CPU's kernels with torch, in each type that a model may have."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import njit
from torch import nn

from quire.engine.attention.metadata import AttentionMetadata
from quire.engine.body.flat_decoder import FlatDecoder, FlatLayer, Mlp, Norm, TorchOps
from quire.engine.devices.cpu.attention import CpuPlanner
from quire.engine.devices.cpu.decoder import CpuDecoder, can_compile
from quire.engine.devices.cpu.packed_linear import PackedLinear
from quire.engine.sampling.counter_rng import exponential, stream_keys
from quire.kernels.cpu import norms
from quire.kernels.cpu.arrays import as_array
from quire.kernels.cpu.numbers import LANES, exp, store, to_float
from quire.kernels.cpu.panels import PANEL_COLUMNS, PANEL_ROWS, PANEL_VECTORS, multiply_add
from quire.kernels.cpu.region import launch
from quire.kernels.cpu.sampling import draw, race
from quire.kernels.cpu.softmax import KEYS, weigh

from .flat_layers import HEADS, HIDDEN, KV_HEADS, Rotary, make_layer, normed_updates

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def make_metadata(slots: list[int], head_dim: int, dtype: torch.dtype) -> AttentionMetadata:
    """Make metadata in which every token is the only one of its sequence."""
    tokens = len(slots)
    loc = torch.arange(tokens + 1, dtype=torch.int32)
    seq_lens = torch.tensor([slot >= 0 for slot in slots], dtype=torch.int32)
    kv_cache = torch.zeros(1, 2, 8, KV_HEADS, 16, head_dim, dtype=dtype)
    return AttentionMetadata(
        kv_cache=kv_cache,
        slot_mapping=torch.tensor(slots),
        block_table=torch.tensor(slots, dtype=torch.int32)[:, None] // 16,
        query_start_loc=loc,
        seq_lens=seq_lens,
        num_decodes=tokens,
        max_query_len=1,
        plan=CpuPlanner(HEADS, kv_cache).cut(loc.numpy(), seq_lens.numpy()),
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that the result is within its type's rounding of what float32 gives."""
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
def test_every_sixteen_bit_number_survives_a_round_trip(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)
    out = torch.empty_like(numbers)
    round_trip(as_array(numbers), as_array(out))
    assert torch.equal(out.isnan(), numbers.isnan())
    real = ~numbers.isnan()
    assert torch.equal(out.view(torch.int16)[real], numbers.view(torch.int16)[real])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_is_rounded_as_in_torch(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (512, 512), generator=torch.Generator().manual_seed(0))
    numbers = bits.to(torch.int32).view(torch.float32)
    ties = torch.arange(0x3F800000, 0x3F800000 + (1 << 18), 0x800, dtype=torch.int32)
    numbers.view(-1)[: len(ties)] = ties.view(torch.float32)
    out = torch.empty(numbers.shape, dtype=dtype)
    round_to(as_array(numbers), as_array(out))
    torch.testing.assert_close(out, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_the_exponential_has_its_stated_accuracy() -> None:
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
    def apply(left, right, out, rows):  # type: ignore[no-untyped-def]
        stride = 3 * PANEL_COLUMNS
        multiply_add(left, 2, 1, right, 4 * PANEL_COLUMNS, stride, 7, out, 4, 3, rows)

    rng = np.random.default_rng(0)
    left = rng.standard_normal((2 + 2 * PANEL_ROWS, 9), dtype=np.float32)
    right = rng.standard_normal((10, 3 * PANEL_COLUMNS), dtype=np.float32)
    for rows in range(1, 2 * PANEL_ROWS + 1):
        out = np.ones((4 + 3 * PANEL_ROWS, 3 * PANEL_COLUMNS), dtype=np.float32)
        apply(left, right, out, rows)
        product = left[2 : 2 + rows, 1:8] @ right[1:8, PANEL_COLUMNS : 2 * PANEL_COLUMNS]
        inside = (slice(4, 4 + rows), slice(3, 3 + PANEL_COLUMNS))
        np.testing.assert_allclose(out[inside], 1 + product, rtol=1e-5, atol=1e-5)
        out[inside] = 1
        assert (out == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_panel_of_scattered_vectors(dtype: torch.dtype) -> None:
    @njit
    def apply(left, right, places, out, rows):  # type: ignore[no-untyped-def]
        multiply_add(left, 0, 2, right, places, 20, 5, out, 0, 3, rows)

    rng = np.random.default_rng(0)
    left = rng.standard_normal((9, 8), dtype=np.float32)
    right = torch.randn(2, 3, 200).to(dtype)
    places = rng.permutation(500)[:PANEL_VECTORS]
    lines = [right.flatten()[place : place + 100].view(5, 20)[:, :LANES] for place in places]
    for rows in range(1, 10):
        out = np.ones((9, PANEL_COLUMNS + 5), dtype=np.float32)
        apply(left, as_array(right), places, out, rows)
        expected = 1 + left[:rows, 2:7] @ torch.cat(lines, dim=1).float().numpy()
        inside = (slice(rows), slice(3, 3 + PANEL_COLUMNS))
        np.testing.assert_allclose(out[inside], expected, rtol=1e-5, atol=1e-5)
        out[inside] = 1
        assert (out == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_panel_of_scattered_rows(dtype: torch.dtype) -> None:
    @njit
    def apply(left, right, lines, out, rows):  # type: ignore[no-untyped-def]
        multiply_add(left, 0, 2, right, 11, lines, 5, out, 0, 3, rows)

    rng = np.random.default_rng(0)
    left = rng.standard_normal((9, 8), dtype=np.float32)
    right = torch.randn(2, 3, 200).to(dtype)
    lines = rng.permutation(1100)[:5]
    picked = torch.stack([right.flatten()[11 + line :][:PANEL_COLUMNS] for line in lines])
    for rows in range(1, 10):
        out = np.ones((9, PANEL_COLUMNS + 5), dtype=np.float32)
        apply(left, as_array(right), lines, out, rows)
        expected = 1 + left[:rows, 2:7] @ picked.float().numpy()
        inside = (slice(rows), slice(3, 3 + PANEL_COLUMNS))
        np.testing.assert_allclose(out[inside], expected, rtol=1e-5, atol=1e-5)
        out[inside] = 1
        assert (out == 1).all()


def test_weights_of_the_softmax() -> None:
    @njit
    def apply(scores, begin, end, least):  # type: ignore[no-untyped-def]
        return weigh(scores, 1, begin, end, least)

    rng = np.random.default_rng(0)
    for begin, end in [(0, KEYS), (0, 1), (3, 40), (KEYS - 1, KEYS), (5, 5), (0, -3)]:
        for least in (-np.inf, 0.5, 90.0):
            scores = rng.normal(0, 10, (3, KEYS)).astype(np.float32)
            before = scores.copy()
            greatest, total = apply(scores, begin, end, np.float32(least))
            seen = before[1, begin : max(begin, end)]
            assert greatest == max([least, *seen])
            expected = np.zeros(KEYS)
            expected[begin : max(begin, end)] = np.exp(seen.astype(np.float64) - greatest)
            np.testing.assert_allclose(scores[1], expected, rtol=2e-5, atol=1e-37)
            assert not scores[1, :begin].any() and not scores[1, max(begin, end) :].any()
            np.testing.assert_allclose(total, expected.sum(), rtol=2e-5, atol=1e-37)
            assert np.array_equal(scores[[0, 2]], before[[0, 2]])


def test_a_visible_nan_score_propagates_through_the_softmax() -> None:
    @njit
    def apply(scores, begin):  # type: ignore[no-untyped-def]
        return weigh(scores, 0, begin, KEYS, np.float32(-np.inf))

    scores = np.zeros((1, KEYS), dtype=np.float32)
    scores[0, 7] = np.nan
    assert apply(scores.copy(), 8) == (0.0, KEYS - 8)
    assert np.isnan(apply(scores, 7)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 13, 200])
@pytest.mark.parametrize(("depth", "columns"), [(20, 40), (1100, 7)])
@torch.no_grad()
def test_packed_products(depth: int, columns: int, rows: int, dtype: torch.dtype) -> None:
    """There are more rows than in an item, more depth than in one read, and a partial panel."""
    linear = nn.Linear(depth, columns, dtype=dtype)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach()
    x = torch.randn(2, rows, depth).to(dtype)
    packed = PackedLinear(linear)
    assert torch.equal(packed.weight, weight) and linear.weight.numel() == 0
    actual = packed(x)
    assert actual.dtype == dtype
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert_close(actual, expected.float())
    alone = torch.stack([packed(x[1, row]) for row in range(rows)])
    assert torch.equal(alone, actual[1])


@pytest.mark.parametrize("tokens", [300, 32000])
def test_the_race_equals_that_of_torch(tokens: int) -> None:
    rows = 40
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    relative = -3 * torch.rand(rows, tokens, generator=generator)
    relative[::2] *= 30
    relative[3, 5:] = -torch.inf
    ids = torch.randperm(tokens, generator=generator)[None].repeat(rows, 1)
    winners = np.empty(rows, np.int64)
    for token_ids in (torch.arange(tokens)[None], ids):
        race(relative.numpy(), keys.numpy(), token_ids.numpy(), winners)
        expected = (relative.exp() / exponential(keys, token_ids)).argmax(dim=1)
        assert winners.tolist() == expected.tolist()
    assert winners[3] < 5 and len(set(winners.tolist())) > rows // 2
    race(relative.fill_(-torch.inf).numpy(), keys.numpy(), ids.numpy(), winners)
    assert not winners.any()


def test_a_draw_equals_the_race_over_its_rows() -> None:
    rows, tokens = 9, 3000
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, tokens, generator=generator)
    working_rows, batch_rows = torch.tensor([7, 0, 3]), torch.tensor([11, 2, 5])
    seeds = torch.randint(-(2**63), 2**63 - 1, (3,), generator=generator)
    positions = torch.arange(20, 32)
    temperatures = torch.tensor([[0.5], [1.0], [2.0]])
    tops = logits.max(dim=1).values
    token_ids, winners = torch.arange(tokens)[None], np.empty(3, np.int64)
    parts = (logits, working_rows, tops, temperatures, seeds, positions, batch_rows, token_ids)
    draw(*(part.numpy() for part in parts), winners)
    relative = (logits[working_rows] - tops[working_rows, None]) / temperatures
    keys = stream_keys(seeds, positions[batch_rows])
    expected = (relative.exp() / exponential(keys, token_ids)).argmax(dim=1)
    assert winners.tolist() == expected.tolist()


def exact(value: Any) -> Any:
    """Return a layer with the same weights in float32."""
    if isinstance(value, Norm):
        return Norm(value.weight.float(), value.eps)
    if isinstance(value, Mlp):
        return Mlp(*map(exact, value))
    return copy.deepcopy(value).float() if isinstance(value, nn.Linear) else value


OPTIONS: dict[str, Callable[[FlatLayer], dict[str, Any]]] = {
    "plain": lambda layer: {},
    "no rotation": lambda layer: {"rotates": False},
    "neighbours rotate": lambda layer: {"rotates_pairs": True},
    "scaled updates": lambda layer: {"update_scale": 0.22},
    "a norm of all heads": lambda layer: {"norms_all_heads": layer.qk_norm is not None},
    "normed updates": normed_updates,
    "only updates are normed": lambda layer: {
        **normed_updates(layer),
        "input_norm": None,
        "mlp_norm": None,
    },
}


@pytest.mark.parametrize(
    ("head_dim", "has_norm", "dtype", "options"),
    [
        *((*case, "plain") for case in itertools.product([4, 20, 64, 96], [True, False], DTYPES)),
        *((20, True, torch.float32, option) for option in OPTIONS if option != "plain"),
        (20, False, torch.float32, "neighbours rotate"),
        (20, False, torch.float32, "only updates are normed"),
    ],
)
@torch.no_grad()
def test_a_compiled_body_equals_plain_torch(
    head_dim: int, has_norm: bool, dtype: torch.dtype, options: str
) -> None:
    slots = [16, 0, -1, 112, 32]  # the first token of its sequence, in the first slot of a block
    layer = make_layer(head_dim, has_norm, dtype)
    layer = layer._replace(**OPTIONS[options](layer))
    embedding = nn.Embedding(9, HIDDEN, dtype=dtype)
    # With "dynamic" only a part of a head rotates.
    rotary = Rotary(*((head_dim, "default") if has_norm else (head_dim // 4 * 2, "dynamic")))
    last_norm, embedding_scale = make_layer(4, True, dtype).mlp_norm, 1.0 if has_norm else 3.5
    flat = FlatDecoder(embedding, rotary, [layer], last_norm, embedding_scale)
    exact_flat = flat._replace(
        embedding=copy.deepcopy(embedding).float(),
        layers=[FlatLayer(*(exact(value) for value in layer))],
        norm=exact(flat.norm),
    )
    seen: list[torch.Tensor] = []

    def attention(_: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        seen.extend((key, value))
        return value.repeat_interleave(HEADS // KV_HEADS, dim=1)  # each token sees only itself

    ids, positions = torch.tensor([3, 8, 0, 5, 5]), torch.tensor([0, 7, 1, 98, 3])
    expected = exact_flat(ids, positions, TorchOps(attention))
    metadata = make_metadata(slots, head_dim, dtype)
    assert can_compile(flat)
    decoder = CpuDecoder(flat)
    picks, head = torch.tensor([3, 0]), nn.Linear(HIDDEN, 45, dtype=dtype)
    _, no_logits, _ = decoder.forward_to_logits(ids, positions, picks[:0], metadata)
    run = decoder.fuse_head(PackedLinear(copy.deepcopy(head)))
    assert run is not None
    actual, logits, _ = run(ids, positions, picks, metadata)
    assert actual.dtype == logits.dtype == dtype and layer.qkv.weight.numel() == 0
    assert no_logits.numel() == 0
    written = [row for row, slot in enumerate(slots) if slot >= 0]
    assert_close(actual[written], expected[written])
    assert_close(logits, exact(head)(expected[picks]))
    keys, values = metadata.kv_cache[0]
    keys = keys.reshape(8, KV_HEADS, head_dim, 16).transpose(-1, -2)
    for half, part in zip((keys, values), seen, strict=True):
        by_slot = half.transpose(1, 2).reshape(128, KV_HEADS, head_dim)
        scale = max(1.0, float(part.abs().max()))
        assert_close(by_slot[[slots[row] for row in written]] / scale, part[written] / scale)
        untouched = [slot for slot in range(128) if slot not in slots]
        assert not by_slot[untouched].any()


def test_other_activations_and_layers_that_differ_are_not_compiled() -> None:
    layer, other = make_layer(4, True, torch.float32), make_layer(4, False, torch.float32)
    flat = FlatDecoder(nn.Embedding(2, HIDDEN), Rotary(4), [layer, layer], layer.mlp_norm)
    assert can_compile(flat)
    assert not can_compile(flat._replace(layers=[layer, other]))
    capped = layer._replace(softcap=30.0)
    normed = layer._replace(output_norm=layer.mlp_norm)  # and not the other one
    with_sinks = layer._replace(sinks=torch.zeros(HEADS))
    gelu = layer._replace(mlp=layer.mlp._replace(is_silu=False))
    for odd in (gelu, capped, with_sinks, normed):
        assert not can_compile(flat._replace(layers=[odd]))


def test_a_row_s_norm_does_not_depend_on_where_its_arrays_are() -> None:
    rng, memory = np.random.default_rng(4), np.zeros(1000, np.float32)
    epsilons, no_ids = np.full(1, 1e-5, np.float32), np.empty(0, np.int64)
    none = (np.empty((0, 1), np.float32), np.empty((0, 1), np.float32), np.empty(0, np.float32))
    for length in range(1, 100):
        x, weights = (rng.standard_normal((1, length), dtype=np.float32) for _ in range(2))
        memory[:length] = x[0]
        outs = []
        for begin in (length, 900 - length):  # right after x, and far from it
            out = memory[begin : begin + length][None]
            norm = norms.Norm(
                *(memory[None, :length], weights, epsilons, out, *none, no_ids, weights),
                np.float32(1),
            )
            launch(norms.normalise, norm, 1, 1, 1)
            outs.append(out.copy())
        assert np.array_equal(*outs), length
