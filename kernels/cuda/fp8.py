"""Conversions for the float8 (e4m3) KV cache, the views of it that launchers pass to kernels, and
rows of activations rounded to float8.

An OCP e4m3 number has the bits s·eeee·mmm and the exponent bias 7. There is no infinity, NaN has
all of eeee·mmm set, and the largest number is 448 ("FP8 formats for deep learning", arXiv
2209.05433). Its bits shifted into a float16 (bias 15) are the same number divided by 2^8,
subnormals included.

    stored = round(clamp(x / scale, ±448))      x = stored · scale

There is one float32 scale per kv head for K and one for V in each layer, or none (scale 1).
Attention widens K and V before its matrix products, because sums of float8 products lose accuracy
over long contexts.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ..checks import (
    FLOAT_DTYPES,
    interpreting,
    once_a_signature,
    require,
    require_contiguous,
    require_dtype,
    require_last_contiguous,
    require_launchable,
    require_shape,
)
from . import tuning

E4M3 = torch.float8_e4m3fn
MAX_ROW = 65536
"""Longest row that one program holds in registers."""


@triton.jit
def to_e4m3(x):
    """Return the e4m3 bits (uint8) of float32 `x`, rounded to nearest even.

    Numbers beyond ±448 saturate; NaN stays NaN.
    """
    # 1. Round a normal number as an integer: of float32's 23 mantissa bits 20 are cut off, after
    #    adding just less than half of their unit plus the lowest kept bit (ties go to even), and
    #    the exponent is rebiased from 127 to 7.
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1) - (120 << 23)) >> 20
    # 2. Round a subnormal result by an addition: the unit in the last place of 2^14 is 2^-9, the
    #    smallest subnormal, so the low bits of the sum count how many of them `size` is.
    subnormal = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    # 3. Choose by the smallest normal number, 2^-6; then put in NaN and the sign.
    code = tl.where(size < 0.015625, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def load_scale(kv_scales_ptr, row: tl.constexpr, head, NUM_KV_HEADS: tl.constexpr):
    """Load the scales of K (row 0) or V (row 1) for these kv heads; None if there are no scales.

    The return without a value is how None must be written: Triton 3.6 rejects `return None`.
    """
    if kv_scales_ptr is None:
        return
    else:
        scales_ptr = kv_scales_ptr + row * NUM_KV_HEADS + head
        return tl.load(scales_ptr, mask=head < NUM_KV_HEADS, other=1.0)


@triton.jit
def store_as(target, x, scale, mask):
    """Store float `x` in the cache's dtype. A uint8 cache holds the e4m3 bits of x / scale."""
    if target.dtype.element_ty == tl.uint8:
        wide = x.to(tl.float32)
        if scale is not None:
            wide = tl.div_rn(wide, tl.broadcast_to(scale, wide.shape))
        tl.store(target, to_e4m3(wide), mask=mask)
    else:
        tl.store(target, x.to(target.dtype.element_ty), mask=mask)


@triton.jit
def widen(tile, dtype: tl.constexpr):
    """Convert a tile of the cache to the dtype of a matrix product's operands.

    A uint8 tile holds e4m3 bits, which are widened by shifts: before sm_89 no instruction does it.
    """
    if tile.dtype == tl.uint8:
        bits = tile.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        half = tl.where((bits & 0x7F) == 0x7F, float("nan"), half * 256.0)
        return half.to(dtype)
    else:
        return tile.to(dtype)


@triton.jit
def widen_in_place(tile, dtype: tl.constexpr):
    """Convert a tile as `widen` does, in the layout that it was loaded in: 16 bytes a thread.

    Left alone, Triton moves the conversion into the layout of a product's operand, to bring half as
    many bytes through shared memory, and then reads V byte by byte there. It moves nothing past
    this instruction, which changes nothing.
    """
    if tile.dtype == tl.uint8 or dtype != tl.float16:
        return widen(tile, dtype)
    else:
        half = widen(tile, tl.float16)
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [half], dtype=tl.float16, is_pure=False, pack=2
        )


@triton.jit
def as_operand(query, cache_ptr):
    """Convert queries to the dtype that the cache is widened to.

    With an e4m3 cache, bfloat16 queries become float16, which the device converts e4m3 to and which
    holds it exactly. A query beyond float16's 65504 becomes infinite, so its row becomes NaN: an
    error that is seen rather than a silently wrong result.
    """
    is_float8: tl.constexpr = cache_ptr.dtype.element_ty.primitive_bitwidth == 8
    if is_float8 and query.dtype == tl.bfloat16:
        return query.to(tl.float16)
    else:
        return query


@triton.jit
def _quantize_rows_kernel(
    out_ptr, scale_ptr, input_ptr, input_stride, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE_PAD)
    mask = column < SIZE
    x = tl.load(input_ptr + row * input_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 0), 1e-12), 448.0)
    tl.store(scale_ptr + row, scale)
    rounded = to_e4m3(tl.div_rn(x, tl.broadcast_to(scale, x.shape)))
    tl.store(out_ptr + row * SIZE + column, rounded, mask=mask)


@once_a_signature
def _check_rows(input: torch.Tensor, out: torch.Tensor, scale: torch.Tensor) -> None:
    require_shape("input", input, None, None)
    require_dtype("input", input, *FLOAT_DTYPES)
    require_last_contiguous("input", input)
    require_shape("out", out, *input.shape)
    require_dtype("out", out, E4M3)
    require_contiguous("out", out)
    require_shape("scale", scale, len(input), 1)
    require_dtype("scale", scale, torch.float32)
    require_contiguous("scale", scale)
    require(0 < input.shape[1] <= MAX_ROW, f"rows must have 1 to {MAX_ROW} numbers")
    require_launchable(input=input, out=out, scale=scale)


def quantize_rows(input: torch.Tensor, out: torch.Tensor, scale: torch.Tensor) -> None:
    """Round each row of input `[R, N]` to float8 by a scale of its own: input is about out
    (float8_e4m3fn) times scale `[R, 1]` (float32), whose greatest magnitude is 448.

    A row of zeros has the scale 1e-12 / 448. Raises ValueError on shapes, dtypes, devices or
    layouts that do not fit.
    """
    _check_rows(input, out, scale)
    num_rows, size = input.shape
    if num_rows == 0:
        return
    size_pad = triton.next_power_of_2(size)
    _quantize_rows_kernel[(num_rows,)](
        bits_view(out), scale, input, input.stride(0), SIZE=size, SIZE_PAD=size_pad,
        num_warps=min(16, max(1, size_pad // 256)),
    )  # fmt: skip


def bits_view(cache: torch.Tensor) -> torch.Tensor:
    """Return the view for kernels that write: an e4m3 cache as uint8, any other as it is."""
    return cache.view(torch.uint8) if cache.dtype == E4M3 else cache


def readable_view(cache: torch.Tensor) -> torch.Tensor:
    """Return the view for the attention kernels: an e4m3 cache as it is if the device can widen it.

    That is so from sm_89 on. Triton's interpreter converts e4m3 too, but not its NaN, so it gets
    the bytes.
    """
    native = tuning.compute_capability(cache.device) >= 89 and not interpreting()
    return cache if native else bits_view(cache)


def has_room_to_widen(device: torch.device) -> bool:
    """Return whether a program's shared memory holds a float8 tile beside the widened one, and
    that of three programs an SM: so it is from 9.0 to 10.x, where the tile is widened natively,
    too."""
    return 90 <= tuning.compute_capability(device) < 120


def check_scales(kv_scales: torch.Tensor | None, cache: torch.Tensor, num_kv_heads: int) -> None:
    """Raise ValueError unless `kv_scales` is None or fits: `[2, num_kv_heads]`, e4m3 cache."""
    if kv_scales is None:
        return
    require(cache.dtype == E4M3, f"kv_scales need a float8_e4m3fn cache, not {cache.dtype}")
    require_dtype("kv_scales", kv_scales, torch.float32)
    require_shape("kv_scales", kv_scales, 2, num_kv_heads)
    require_contiguous("kv_scales", kv_scales)
