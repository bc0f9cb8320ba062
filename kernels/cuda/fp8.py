"""The float8 (e4m3) KV cache: bits to and from wider floats, and what launchers do about it.

An e4m3 number is s·eeee·mmm with bias 7: no infinity, NaN where all of eeee·mmm is set, at most
448 ("FP8 formats for deep learning", arXiv 2209.05433). Shifted into a float16 it is the same
number over 2^8, subnormals included. A layer's cache may hold x / scale, one float32 scale a kv
head for K and one for V; without scales it holds x. Attention widens K and V before its dots:
sums of float8 products lose accuracy over long contexts.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ..checks import require, require_contiguous, require_dtype, require_shape
from . import tuning

E4M3 = torch.float8_e4m3fn


@triton.jit
def to_e4m3(x):
    """The e4m3 bits (uint8) of float32 `x`: to nearest even, saturating at 448, NaN kept."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1) - (120 << 23)) >> 20
    # One unit in the last place of 2^14 is the least subnormal, 2^-9: the addition rounds to it.
    subnormal = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def load_scale(kv_scales_ptr, row: tl.constexpr, head, NUM_KV_HEADS: tl.constexpr):
    """K's (row 0) or V's (row 1) scale of these kv heads; None where there are none, which
    Triton 3.6 takes from a bare return alone."""
    if kv_scales_ptr is None:
        return
    else:
        scales_ptr = kv_scales_ptr + row * NUM_KV_HEADS + head
        return tl.load(scales_ptr, mask=head < NUM_KV_HEADS, other=1.0)


@triton.jit
def store_as(target, x, scale, mask):
    """Store float `x` in the cache's dtype; uint8 stands for e4m3, which holds x / scale."""
    if target.dtype.element_ty == tl.uint8:
        wide = x.to(tl.float32)
        if scale is not None:
            wide = tl.div_rn(wide, tl.broadcast_to(scale, wide.shape))
        tl.store(target, to_e4m3(wide), mask=mask)
    else:
        tl.store(target, x.to(target.dtype.element_ty), mask=mask)


@triton.jit
def widen(tile, dtype: tl.constexpr):
    """A tile of the cache as operand of a dot; uint8 are e4m3 bits where no instruction helps."""
    if tile.dtype == tl.uint8:
        bits = tile.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        half = tl.where((bits & 0x7F) == 0x7F, float("nan"), half * 256.0)
        return half.to(dtype)
    else:
        return tile.to(dtype)


@triton.jit
def as_operand(query, cache_ptr):
    """Queries in the dtype that the cache is widened to: float16 for e4m3, which holds it exactly.

    A query beyond float16's 65504 becomes infinite, and its row NaN: seen, not silently wrong.
    """
    is_float8: tl.constexpr = cache_ptr.dtype.element_ty.primitive_bitwidth == 8
    if is_float8 and query.dtype == tl.bfloat16:
        return query.to(tl.float16)
    else:
        return query


def bits_view(cache: torch.Tensor) -> torch.Tensor:
    """What the writing kernels are given: an e4m3 cache's bytes, any other cache itself."""
    return cache.view(torch.uint8) if cache.dtype == E4M3 else cache


def readable_view(cache: torch.Tensor) -> torch.Tensor:
    """What the attention kernels are given: from sm_89 on the device widens e4m3 itself."""
    native = tuning.compute_capability(cache.device) >= 89 and not _interpreted()
    return cache if native else bits_view(cache)


def _interpreted() -> bool:
    """The interpreter knows e4m3 but for its NaN."""
    return bool(triton.knobs.runtime.interpret)


def check_scales(kv_scales: torch.Tensor | None, cache: torch.Tensor, num_kv_heads: int) -> None:
    """Raise ValueError unless `kv_scales` is None, or `[2, num_kv_heads]` for an e4m3 cache."""
    if kv_scales is None:
        return
    require(cache.dtype == E4M3, f"kv_scales belong to a float8_e4m3fn cache, not {cache.dtype}")
    require_dtype("kv_scales", kv_scales, torch.float32)
    require_shape("kv_scales", kv_scales, 2, num_kv_heads)
    require_contiguous("kv_scales", kv_scales)
