"""The product of activations and weights of 4 or 8 bits (W4A16, W8A16).

    out = x · Wᵀ + bias,    W[n, k] = scale[n, g] · q[n, k] + minimum[n, g],    g = k // group size

q has 4 bits (two columns in a byte, the even one in the low half), 8 bits, or is e4m3. A program
reads a tile of q, makes numbers of the activations' type of it in registers, and multiplies: only
the integers are read from memory. The grid is (columns, rows, parts of K); with few rows K is split
so that all multiprocessors read, and the parts' float32 sums are added in order afterwards.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ..checks import (
    FLOAT_DTYPES,
    once_a_signature,
    require,
    require_contiguous,
    require_dtype,
    require_last_contiguous,
    require_launchable,
    require_shape,
)
from .fp8 import E4M3, readable_view, widen
from .tuning import product_config, product_parts


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_product_kernel(
    out_ptr,
    input_ptr,
    quants_ptr,
    scale_ptr,
    minimum_ptr,
    bias_ptr,
    num_rows,
    num_columns,
    depth,
    group_size,
    num_groups,
    part_depth,
    input_stride,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # over 50 lines: a third of them are its arguments
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(2) * part_depth
    # Columns beyond the last read those of the last, whose results are not stored.
    source = tl.minimum(column, num_columns - 1).to(tl.int64)
    x_ptrs = input_ptr + row.to(tl.int64)[:, None] * input_stride + tl.arange(0, BLOCK_K)[None, :]
    SETS: tl.constexpr = BLOCK_K // SPAN
    group_ptrs = source[:, None] * num_groups + tl.arange(0, SETS)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, tl.minimum(first + part_depth, depth), BLOCK_K):
        # 1. Read q, one in an element.
        if BITS == 4:
            octet = tl.arange(0, BLOCK_K // 2)
            pairs = tl.load(
                quants_ptr + source[:, None] * (depth // 2) + (start // 2 + octet)[None, :]
            )
            q = tl.interleave(pairs & 15, pairs >> 4).to(tl.float32)
        else:
            tile = tl.load(
                quants_ptr + source[:, None] * depth + (start + tl.arange(0, BLOCK_K))[None, :]
            )
            q = tile.to(tl.float32) if tile.dtype == tl.int8 else widen(tile, tl.float32)
        # 2. Make weights of them: SPAN columns in turn share a scale.
        group = start // group_size
        scale = tl.load(scale_ptr + group_ptrs + group)
        weight = tl.reshape(q, (BLOCK_N, SETS, SPAN)) * scale[:, :, None]
        if minimum_ptr is not None:
            weight += tl.load(minimum_ptr + group_ptrs + group)[:, :, None]
        weight = tl.reshape(weight, (BLOCK_N, BLOCK_K)).to(input_ptr.dtype.element_ty)
        # 3. Multiply.
        x = tl.load(x_ptrs + start, mask=row[:, None] < num_rows, other=0.0)
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + source).to(tl.float32)[None, :]
    line = tl.program_id(2).to(tl.int64) * num_rows + row
    tl.store(
        out_ptr + line[:, None] * num_columns + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(row[:, None] < num_rows) & (column[None, :] < num_columns),
    )


def can_multiply(depth: int, group_size: int) -> bool:
    """Return whether the kernel multiplies rows of this many columns in such groups."""
    return _block_of(depth, group_size, 128) >= 16


def grouped_product(
    input: torch.Tensor,
    quants: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # over 50 lines: more than half of them are its arguments and the kernel's
    """Return x · Wᵀ + bias `[num_rows, N]` of x `[num_rows, K]`, of x's dtype.

    `quants` holds q as int8 or float8_e4m3fn `[N, K]`, or as uint8 `[N, K / 2]`; scale and minimum
    are float32 `[N, K / group size]`. W is rounded to x's dtype and sums are float32. Raises
    ValueError on shapes, dtypes or devices that do not fit, and if `can_multiply` is false.
    """
    _check(input, quants, scale, minimum, bias)
    num_rows, depth = input.shape
    num_columns, num_groups = scale.shape
    group_size = depth // num_groups
    out = input.new_empty(num_rows, num_columns)
    if num_rows == 0:
        return out
    # Launch over all of K, or over parts of it.
    config = product_config(num_rows, input.dtype)
    block_k = _block_of(depth, group_size, config.block_k)
    blocks = triton.cdiv(num_columns, config.block_n)
    parts = product_parts(num_rows, blocks, depth // block_k, input.device)
    part_depth = triton.cdiv(depth // block_k, parts) * block_k
    sums = out if parts == 1 else input.new_empty(parts, num_rows, num_columns, dtype=torch.float32)
    _grouped_product_kernel[(blocks, triton.cdiv(num_rows, config.block_m), parts)](
        sums,
        input,
        readable_view(quants) if quants.dtype == E4M3 else quants,
        scale,
        minimum,
        bias if parts == 1 else None,
        num_rows,
        num_columns,
        depth,
        group_size,
        num_groups,
        part_depth,
        input.stride(0),
        BITS=4 if quants.dtype == torch.uint8 else 8,
        SPAN=min(group_size, block_k),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        PRECISION="ieee" if input.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if parts == 1:
        return out
    total = sums.sum(dim=0)
    return out.copy_(total if bias is None else total + bias)


@once_a_signature
def _check(
    input: torch.Tensor,
    quants: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    require_shape("input", input, None, None)
    require_dtype("input", input, *FLOAT_DTYPES)
    require_last_contiguous("input", input)
    depth = input.shape[1]
    require_dtype("quants", quants, torch.uint8, torch.int8, E4M3)
    bits = 4 if quants.dtype == torch.uint8 else 8
    num_columns = quants.shape[0]
    require_shape("quants", quants, num_columns, depth * bits // 8)
    require_contiguous("quants", quants)
    require_shape("scale", scale, num_columns, None)
    num_groups = scale.shape[1]
    require(num_groups > 0 and depth % num_groups == 0, f"{num_groups} groups of {depth} columns")
    group_size = depth // num_groups
    for name, numbers in (("scale", scale), ("minimum", minimum)):
        if numbers is not None:
            require_dtype(name, numbers, torch.float32)
            require_shape(name, numbers, *scale.shape)
            require_contiguous(name, numbers)
    if bias is not None:
        require_dtype("bias", bias, *FLOAT_DTYPES)
        require_shape("bias", bias, num_columns)
        require_contiguous("bias", bias)
    require(can_multiply(depth, group_size), f"groups of {group_size} in {depth} columns")
    require_launchable(input=input, quants=quants, scale=scale, minimum=minimum, bias=bias)


def _block_of(depth: int, group_size: int, largest: int) -> int:
    """Return the number of columns in a tile: the largest power of two that cuts rows into equal
    tiles, each in one group or of whole groups; 0 if there is none."""
    block = largest
    while block and (depth % block or (group_size % block and block % group_size)):
        block //= 2
    return block
