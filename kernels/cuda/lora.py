"""LoRA adapters (arXiv 2106.09685), many in one step: out += B A x for rows that have an adapter.

    shrink    h[p, i] = A[s, p] x[order[i]]               for loc[s] ≤ i < loc[s + 1]
    expand    out[order[i], columns of p] += B[s] h[p, i]

`order` lists the rows that have an adapter, sorted by its slot s; `loc` says where each slot's
begin. p counts the parts of a merged product (Q, K and V; gate and up), each with an A of its own
and its own columns. That is the segmented product of Punica (arXiv 2310.18547) and S-LoRA (arXiv
2311.03285). The grid depends on the number of rows only, and programs without rows leave at once:
so a CUDA graph serves any assignment of adapters, which it reads from fixed addresses.

No program adds to a sum of another one, and each sum runs over the features in one order. Rows that
are not in `order` are not touched.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ..checks import (
    FLOAT_DTYPES,
    require,
    require_contiguous,
    require_dtype,
    require_last_contiguous,
    require_launchable,
    require_shape,
)

MAX_PARTS = 3
"""Maximum parts of a product."""
BLOCK_M = 16
"""Rows per program: the least that a tensor core takes, since most adapters have few rows."""
BLOCK_K, BLOCK_N = 128, 64
"""Input features per pass of a shrink, and output columns per program of an expand."""


@triton.jit
def _rows_of(order_ptr, loc_ptr, slot, BLOCK_M: tl.constexpr):
    """Return the places in `order` of this program's rows, and which of them are there."""
    place = tl.load(loc_ptr + slot) + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    return place, place < tl.load(loc_ptr + slot + 1)


@triton.jit
def _lora_shrink_kernel(
    h_ptr,
    x_ptr,
    a_ptr,
    order_ptr,
    loc_ptr,
    ranks_ptr,
    x_stride,
    h_stride,
    IN: tl.constexpr,
    PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # 1. The rows of this program: none for most of the grid.
    part, slot = tl.program_id(1), tl.program_id(2)
    place, present = _rows_of(order_ptr, loc_ptr, slot, BLOCK_M)
    rank = tl.load(ranks_ptr + slot * PARTS + part)
    if (tl.max(present.to(tl.int32), 0) == 0) | (rank == 0):
        return
    row = tl.load(order_ptr + place, mask=present, other=0).to(tl.int64)
    # 2. h = A x, one slice of the features after the other.
    column = tl.arange(0, RANK_PAD)
    a_ptrs = a_ptr + (slot * PARTS + part).to(tl.int64) * MAX_RANK * IN + column[None, :] * IN
    total = tl.zeros((BLOCK_M, RANK_PAD), tl.float32)
    for begin in range(0, IN, BLOCK_K):
        feature = begin + tl.arange(0, BLOCK_K)
        inside = feature < IN
        x = tl.load(
            x_ptr + row[:, None] * x_stride + feature[None, :],
            mask=present[:, None] & inside[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptrs + feature[:, None], mask=inside[:, None] & (column < rank)[None, :], other=0.0
        )
        total = tl.dot(x, a, total, input_precision=PRECISION)
    # 3. h is in the order of the sorted rows, so that expand reads it without a detour.
    h_ptrs = h_ptr + part.to(tl.int64) * h_stride + place[:, None] * RANK_PAD + column[None, :]
    tl.store(h_ptrs, total, mask=present[:, None])


@triton.jit
def _lora_expand_kernel(
    out_ptr,
    h_ptr,
    b_ptr,
    order_ptr,
    loc_ptr,
    ranks_ptr,
    out_stride,
    h_stride,
    SIZE_0: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # 1. Which part this block of columns belongs to: blocks never straddle a border.
    block, slot = tl.program_id(1), tl.program_id(2)
    blocks_0, blocks_1 = tl.cdiv(SIZE_0, BLOCK_N), tl.cdiv(SIZE_1, BLOCK_N)
    part = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
    block -= tl.where(part > 0, blocks_0, 0) + tl.where(part > 1, blocks_1, 0)
    left = tl.where(part > 0, SIZE_0, 0) + tl.where(part > 1, SIZE_1, 0)
    size = tl.where(part == 0, SIZE_0, tl.where(part == 1, SIZE_1, SIZE_2))
    # 2. The rows of this program: none for most of the grid.
    place, present = _rows_of(order_ptr, loc_ptr, slot, BLOCK_M)
    rank = tl.load(ranks_ptr + slot * PARTS + part)
    if (tl.max(present.to(tl.int32), 0) == 0) | (rank == 0):
        return
    row = tl.load(order_ptr + place, mask=present, other=0).to(tl.int64)
    # 3. B h, in float32 from end to end, and rounded once when it is added.
    column, inner = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, RANK_PAD)
    inside, used = column < size, inner < rank
    h_ptrs = h_ptr + part.to(tl.int64) * h_stride + place[:, None] * RANK_PAD + inner[None, :]
    h = tl.load(h_ptrs, mask=present[:, None] & used[None, :], other=0.0)
    b_row = slot.to(tl.int64) * (SIZE_0 + SIZE_1 + SIZE_2) + left + column
    b_ptrs = b_ptr + b_row[None, :] * MAX_RANK + inner[:, None]
    b = tl.load(b_ptrs, mask=inside[None, :] & used[:, None], other=0.0).to(tl.float32)
    delta = tl.dot(h, b, input_precision=PRECISION)
    out_ptrs = out_ptr + row[:, None] * out_stride + left + column[None, :]
    mask = present[:, None] & inside[None, :]
    total = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32) + delta
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


def rank_pad(max_rank: int) -> int:
    """Return the last dimension of `h`: a power of two, and what a tensor core takes at least."""
    return 1 << (max(16, max_rank) - 1).bit_length()


def _check_rows(
    order: torch.Tensor, loc: torch.Tensor, ranks: torch.Tensor, h: torch.Tensor, max_rank: int
) -> None:
    """Check what both launchers share."""
    slots, parts = ranks.shape
    require(1 <= parts <= MAX_PARTS, f"a product has 1 to {MAX_PARTS} parts, not {parts}")
    require_shape("loc", loc, slots + 1)
    for name, tensor in (("order", order), ("loc", loc), ("ranks", ranks)):
        require_dtype(name, tensor, torch.int32)
        require_contiguous(name, tensor)
    require_shape("order", order, None)
    require_dtype("h", h, torch.float32)
    require_shape("h", h, None, None, rank_pad(max_rank))
    require_contiguous("h", h)
    require(h.shape[0] >= parts, f"h has room for {h.shape[0]} parts, not {parts}")


def _precision(dtype: torch.dtype) -> str:
    """Return the precision of float32 products: exact if the model is float32, otherwise TF32,
    which has more bits than the model's own type."""
    return "ieee" if dtype == torch.float32 else "tf32"


def lora_shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    order: torch.Tensor,
    loc: torch.Tensor,
    ranks: torch.Tensor,
    h: torch.Tensor,
) -> None:
    """Compute h `[parts, ., rank_pad]` of x `[T, in_features]`; see above.

    a `[slots, parts, max_rank, in_features]` is of the type of x; order `[.]`, loc `[slots + 1]`
    and ranks `[slots, parts]` are int32. Rows of A beyond a rank are not read. Raises ValueError on
    shapes, dtypes or devices that do not fit.
    """
    slots, parts = ranks.shape
    require_shape("x", x, None, None)
    require_dtype("x", x, *FLOAT_DTYPES)
    require_last_contiguous("x", x)
    require_shape("a", a, slots, parts, None, x.shape[1])
    require_dtype("a", a, x.dtype)
    require_contiguous("a", a)
    max_rank = a.shape[2]
    _check_rows(order, loc, ranks, h, max_rank)
    require(h.shape[1] >= len(x), f"h has room for {h.shape[1]} rows, not {len(x)}")
    require_launchable(x=x, a=a, order=order, loc=loc, ranks=ranks, h=h)
    if len(x) == 0:
        return
    _lora_shrink_kernel[(triton.cdiv(len(x), BLOCK_M), parts, slots)](
        h,
        x,
        a,
        order,
        loc,
        ranks,
        x.stride(0),
        h.stride(0),
        IN=x.shape[1],
        PARTS=parts,
        MAX_RANK=max_rank,
        RANK_PAD=rank_pad(max_rank),
        PRECISION=_precision(x.dtype),
        BLOCK_M=BLOCK_M,
        BLOCK_K=BLOCK_K if rank_pad(max_rank) <= 64 else BLOCK_K // 2,
        num_warps=4,
        num_stages=3,
    )


def lora_expand(
    h: torch.Tensor,
    b: torch.Tensor,
    order: torch.Tensor,
    loc: torch.Tensor,
    ranks: torch.Tensor,
    sizes: tuple[int, ...],
    out: torch.Tensor,
) -> None:
    """Add B h to out `[T, sum of sizes]`, whose rows may be strided; see above.

    `sizes` are the columns of each part. b `[slots, sum of sizes, max_rank]` is of the type of out;
    the rest is as for `lora_shrink`. Raises ValueError on shapes, dtypes or devices that do not
    fit.
    """
    # Over 50 lines, of which half are the arguments of one launch.
    slots, parts = ranks.shape
    require(len(sizes) == parts, f"{parts} parts have {len(sizes)} sizes")
    require_shape("out", out, None, sum(sizes))
    require_dtype("out", out, *FLOAT_DTYPES)
    require_last_contiguous("out", out)
    require_shape("b", b, slots, sum(sizes), None)
    require_dtype("b", b, out.dtype)
    require_contiguous("b", b)
    max_rank = b.shape[2]
    _check_rows(order, loc, ranks, h, max_rank)
    require_launchable(h=h, b=b, order=order, loc=loc, ranks=ranks, out=out)
    if len(out) == 0:
        return
    first, second, third = (*sizes, 0, 0)[:3]
    blocks = sum(triton.cdiv(size, BLOCK_N) for size in sizes)
    _lora_expand_kernel[(triton.cdiv(len(out), BLOCK_M), blocks, slots)](
        out,
        h,
        b,
        order,
        loc,
        ranks,
        out.stride(0),
        h.stride(0),
        SIZE_0=first,
        SIZE_1=second,
        SIZE_2=third,
        PARTS=parts,
        MAX_RANK=max_rank,
        RANK_PAD=rank_pad(max_rank),
        PRECISION=_precision(out.dtype),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        num_stages=1,
    )
