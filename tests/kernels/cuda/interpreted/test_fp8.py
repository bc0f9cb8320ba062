"""Test the float8 cache.

Writes store exactly the bytes that torch converts to. Attention reads the same bytes as the
reference in float64 and is within 1e-6 (float32 queries) and 1e-3 (float16) of it. The error of the
format itself, compared with a cache that was not rounded, is within 5% of the result's norm. Under
the interpreter, e4m3 is decoded from its bits, as on GPUs before sm_89. The conversion instruction
of later GPUs is compiled in test_compile.py and checked by benchmarks/gpu.py.
"""

from typing import Any

import pytest
import torch
from paged import PagedInputs, paged_inputs, relative_error

from quire.kernels import reference
from quire.kernels.cuda.attention.decode_schedule import DecodeWorkspace, build_decode_schedule
from quire.kernels.cuda.attention.paged_attention_decode import paged_attention_decode
from quire.kernels.cuda.attention.paged_attention_extend import paged_attention_extend
from quire.kernels.cuda.copy_blocks import copy_blocks
from quire.kernels.cuda.fp8 import quantize_rows
from quire.kernels.cuda.reshape_and_cache import reshape_and_cache
from quire.kernels.cuda.rope_and_cache import rope_and_cache

E4M3 = torch.float8_e4m3fn
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3}
HEADS = [(4, 2, 64), (14, 2, 32), (3, 1, 80)]


def every_float() -> torch.Tensor:
    """Return all e4m3 numbers, the midpoints between them, their neighbours, and larger numbers."""
    numbers = torch.arange(256).to(torch.uint8).view(E4M3).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(way)) for way in (-1e9, 1e9)]
    special = torch.tensor([0.0, -0.0, 449.0, -1e9, 1e38, float("inf"), -float("inf"), 1e-30])
    found = torch.cat([numbers, middles, *near, special, torch.tensor([float("nan")])])
    padded = torch.zeros(-(-len(found) // 32) * 32)
    padded[: len(found)] = found
    return padded.view(-1, 1, 32)


@pytest.mark.parametrize("scaled", [False, True])
def test_writes_round_as_torch_and_saturate(scaled: bool) -> None:
    x = every_float()
    scales = torch.tensor([[0.37], [12.0]]) if scaled else None
    found = torch.zeros(2, 4, 1, 16, 32, dtype=E4M3)
    expected = found.clone()
    slots = torch.arange(len(x))
    reshape_and_cache(x, -x, *found, slots, kv_scales=scales)
    reference.reshape_and_cache(x, -x, *expected, slots, kv_scales=scales)
    same = found.view(torch.uint8) == expected.view(torch.uint8)
    assert (same | found.float().isnan() & expected.float().isnan()).all()
    assert found.float().isnan().sum() == 2 and found.float().nan_to_num().max() == 448


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotary,dim", [(80, 80), (32, 64)])
def test_rope_writes_what_was_rotated(dtype: torch.dtype, rotary: int, dim: int) -> None:
    """K may round to a neighbouring e4m3 number, 2^-3 apart, if the rotation's last bit differs."""
    query, key = torch.randn(7, 4, dim).to(dtype), torch.randn(7, 2, dim).to(dtype)
    angles = torch.randn(7, rotary // 2).repeat(1, 2)
    scales = torch.tensor([[0.5, 0.01], [2.0, 0.1]])
    slots = torch.tensor([3, -1, 17, 40, -7, 39, 0])
    weights = {"query_weight": torch.randn(dim), "key_weight": torch.randn(dim)}
    found = torch.zeros(2, 4, 2, 16, dim, dtype=E4M3)
    expected = found.clone()
    arguments = (slots, angles.cos(), angles.sin())
    rope_and_cache(query, key, key, *found, *arguments, **weights, kv_scales=scales)
    reference.rope_and_cache(query, key, key, *expected, *arguments, **weights, kv_scales=scales)
    assert torch.equal(found[1].view(torch.uint8), expected[1].view(torch.uint8))
    keys, wanted = found[0].float(), expected[0].float()
    assert ((keys - wanted).abs() <= wanted.abs() / 7).all()
    assert (keys != wanted).float().mean() < 0.02 and keys.any()


def test_copy_blocks() -> None:
    found = torch.randn(3, 2, 6, 2, 16, 32).to(E4M3)
    expected = found.clone()
    sources, destinations = torch.tensor([1, 1, 4]), torch.tensor([0, 5, 2])
    copy_blocks(found, sources, destinations)
    reference.copy_blocks(expected, sources, destinations)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def quantise(inputs: PagedInputs, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide the caches by their scales and round; slots that must not be read stay NaN."""
    caches = (inputs.key_cache, inputs.value_cache)
    key, value = (
        (cache.float() / scale[:, None, None]).clamp(-448, 448).to(E4M3)
        for cache, scale in zip(caches, scales, strict=True)
    )
    return key, value


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "options", [{}, {"window": 20, "softcap": 5.0}], ids=["plain", "window+cap"]
)
def test_attention(
    dtype: torch.dtype, heads: tuple[int, int, int], options: dict[str, Any]
) -> None:
    shape = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": heads[2]}
    scales = torch.rand(2, heads[1]) * 0.02 + 0.005
    inputs = paged_inputs([19, 1, 5], [19, 40, 37], **shape, block_size=16, dtype=dtype)
    caches = quantise(inputs, scales)
    rest = (inputs.block_table, inputs.query_start_loc, inputs.seq_lens)
    options = options | {"scale": inputs.scale}
    more = {"max_query_len": 19, "kv_scales": scales}
    found = paged_attention_extend(inputs.query, *caches, *rest, **options, **more)
    expected = reference.paged_attention_extend(
        inputs.query.double(), *caches, *rest, **options, **more
    )
    assert relative_error(found, expected) < TOLERANCES[dtype]

    inputs = paged_inputs([1] * 4, [70, 0, 1, 33], **shape, block_size=32, dtype=dtype)
    caches = quantise(inputs, scales)
    workspace = DecodeWorkspace.allocate(
        4, *heads, dtype=dtype, device="cpu", min_chunk=32, window=options.get("window")
    )
    build_decode_schedule(inputs.seq_lens, workspace)
    rest = (inputs.block_table, inputs.seq_lens)
    found = paged_attention_decode(
        inputs.query, *caches, *rest, **options, workspace=workspace, kv_scales=scales
    )
    wide = (inputs.query.double(), inputs.key_cache.double(), inputs.value_cache.double())
    for kv_cache, kv_scales, tolerance in (
        (caches, scales, TOLERANCES[dtype]),
        (wide[1:], None, 0.05),
    ):
        expected = reference.paged_attention_decode(
            wide[0], *kv_cache, *rest, **options, kv_scales=kv_scales
        )
        assert relative_error(found, expected) < tolerance


def test_a_nan_in_the_cache_reaches_only_its_row() -> None:
    inputs = paged_inputs([1, 1], [20, 20], num_heads=2, num_kv_heads=1, head_dim=32, block_size=16)
    keys, values = quantise(inputs, torch.ones(2, 1))
    keys[inputs.block_table[1, 0], 0, 3, 5] = float("nan")
    workspace = DecodeWorkspace.allocate(2, 2, 1, 32, dtype=torch.float32, device="cpu")
    build_decode_schedule(inputs.seq_lens, workspace)
    found = paged_attention_decode(
        inputs.query, keys, values, inputs.block_table, inputs.seq_lens, scale=1.0,
        workspace=workspace,
    )  # fmt: skip
    assert found[1].isnan().all() and found[0].isfinite().all()


def test_scales_are_refused() -> None:
    key, slots = torch.zeros(3, 2, 32), torch.zeros(3, dtype=torch.int64)
    narrow, wide = torch.zeros(2, 4, 2, 16, 32, dtype=E4M3), torch.zeros(2, 4, 2, 16, 32)
    for scales in (torch.ones(2), torch.ones(2, 2).double(), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="kv_scales"):
            reshape_and_cache(key, key, *narrow, slots, kv_scales=scales)
    with pytest.raises(ValueError, match="float8"):
        reshape_and_cache(key, key, *wide, slots, kv_scales=torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 48, 64, 700])
def test_rows_are_rounded_as_torch_rounds_them(size: int, dtype: torch.dtype) -> None:
    """Bit by bit, each by its own scale, whatever the others are."""
    generator = torch.Generator().manual_seed(size)
    wide = torch.randn(5, size + 8, generator=generator)
    wide *= torch.tensor([1e-6, 1.0, 300.0, 0.0, 2.0])[:, None]
    rows = wide.to(dtype)[:, :size]
    found = [torch.full((5, size), 9.0).to(E4M3), torch.zeros(5, 1)]
    expected = [part.clone() for part in found]
    quantize_rows(rows, *found)
    reference.quantize_rows(rows, *expected)
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(found[1], expected[1])
    assert found[0][1].float().abs().max() == 448 and not found[0][3].float().any()
    with pytest.raises(ValueError, match="out must be one of"):
        quantize_rows(rows, found[0].float(), found[1])
