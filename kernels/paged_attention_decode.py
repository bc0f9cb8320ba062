"""Attention of one (or a few) new tokens a sequence over its cached blocks, keys split.

Bound by reading K and V once, so the heads of a group share a tile, and a step's keys are spread
over the machine by tokens, not by sequences (Flash-Decoding, with the work list of
decode_schedule.py). A program of grid (kv head, item) folds one chunk of keys:

    one split  → writes `out`
    several    → writes its partial and its log2-sum; the last to arrive merges all of them
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from .attend_tiles import LOG2E, LOWEST, attend_tiles
from .checks import check_attention, require, require_launchable
from .decode_schedule import DecodeWorkspace, build_decode_schedule

__all__ = ["DecodeWorkspace", "build_decode_schedule", "paged_attention_decode"]


@triton.jit
def _merge_partials(
    partials_ptr,
    log_sums_ptr,
    kv_head,
    first_item,
    splits,
    NUM_KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Σ 2^(s_i − max) · o_i / Σ 2^(s_i − max) over a sequence's splits, MERGE at a time.

    Loads go past L1, which may hold what another SM has since overwritten.
    """
    row = tl.arange(0, ROWS_PAD)
    dim = tl.arange(0, DIM_PAD)
    acc = tl.zeros([ROWS_PAD, DIM_PAD], dtype=tl.float32)
    row_max = tl.full([ROWS_PAD], LOWEST, dtype=tl.float32)
    row_sum = tl.zeros([ROWS_PAD], dtype=tl.float32)
    for start in range(0, splits, MERGE):
        split = start + tl.arange(0, MERGE)
        item = ((first_item + split).to(tl.int64) * NUM_KV_HEADS + kv_head) * ROWS
        line = item[:, None] + row[None, :]
        live = (split < splits)[:, None] & (row < ROWS)[None, :]
        log_sum = tl.load(log_sums_ptr + line, mask=live, other=float("-inf"), cache_modifier=".cg")
        partial = tl.load(
            partials_ptr + line[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=live[:, :, None] & (dim < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_max = tl.maximum(row_max, tl.max(log_sum, 0))
        weight = tl.exp2(log_sum - new_max[None, :])
        rescale = tl.exp2(row_max - new_max)
        acc = acc * rescale[:, None] + tl.sum(partial * weight[:, :, None], 0)
        row_sum = row_sum * rescale + tl.sum(weight, 0)
        row_max = new_max
    return acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]


@triton.jit
def _paged_attention_decode_kernel(
    out_ptr,
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_table_ptr,
    seq_lens_ptr,
    sinks_ptr,
    items_ptr,
    partials_ptr,
    log_sums_ptr,
    arrived_ptr,
    scale,
    query_stride_t,
    query_stride_h,
    out_stride_t,
    out_stride_h,
    table_stride,
    items_stride,
    HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    ROWS: tl.constexpr = QUERY_LEN * GROUP
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    seq = tl.load(items_ptr + item)
    if seq < 0:
        return
    begin = tl.load(items_ptr + items_stride + item)
    end = tl.load(items_ptr + 2 * items_stride + item)
    first_item = tl.load(items_ptr + 3 * items_stride + item)
    splits = tl.load(items_ptr + 4 * items_stride + item)

    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DIM_PAD)
    token = (seq * QUERY_LEN + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    mask = (row < ROWS)[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(
        query_ptr + (token * query_stride_t + head * query_stride_h)[:, None] + dim[None, :],
        mask=mask,
        other=0.0,
    )
    positions = tl.load(seq_lens_ptr + seq) - QUERY_LEN + row // GROUP
    acc = tl.zeros([BLOCK_M, DIM_PAD], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_SINKS and item == first_item:  # counted once, whatever the number of splits
        sink = tl.load(sinks_ptr + head, mask=row < ROWS, other=0.0).to(tl.float32)
        row_max = tl.maximum(sink * LOG2E, LOWEST)
        row_sum += 1.0
    table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride
    acc, row_max, row_sum = attend_tiles(
        acc, row_max, row_sum, query, key_cache_ptr, value_cache_ptr, table_ptr, kv_head,
        positions, begin, end, end, scale, True, WINDOW, SOFTCAP, NUM_KV_HEADS, BLOCK_SIZE,
        HEAD_DIM, DIM_PAD, BLOCK_N, PREFETCH,
    )  # fmt: skip
    seen = row_sum > 0
    row_sum = tl.where(seen, row_sum, 1.0)
    acc = acc / row_sum[:, None]
    if splits == 1:
        tl.store(
            out_ptr + (token * out_stride_t + head * out_stride_h)[:, None] + dim[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=mask,
        )
    else:
        line = (item.to(tl.int64) * NUM_KV_HEADS + kv_head) * ROWS + row
        tl.store(partials_ptr + line[:, None] * HEAD_DIM + dim[None, :], acc, mask=mask)
        log_sum = tl.where(seen, row_max + tl.log2(row_sum), float("-inf"))
        tl.store(log_sums_ptr + line, log_sum, mask=row < ROWS)
        tl.debug_barrier()  # every warp's stores stand before the release of the counter
        arrived_ptr += seq * NUM_KV_HEADS + kv_head
        before = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
        if before == splits - 1:
            merged = _merge_partials(
                partials_ptr, log_sums_ptr, kv_head, first_item, splits, NUM_KV_HEADS, ROWS,
                ROWS_PAD, HEAD_DIM, DIM_PAD, MERGE,
            )  # fmt: skip
            out_row = tl.arange(0, ROWS_PAD)
            out_token = (seq * QUERY_LEN + out_row // GROUP).to(tl.int64)
            out_head = kv_head * GROUP + out_row % GROUP
            out_line = out_token * out_stride_t + out_head * out_stride_h
            tl.store(
                out_ptr + out_line[:, None] + dim[None, :],
                merged.to(out_ptr.dtype.element_ty),
                mask=(out_row < ROWS)[:, None] & (dim < HEAD_DIM)[None, :],
            )
            tl.store(arrived_ptr, 0)  # ready for the next launch


def paged_attention_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    workspace: DecodeWorkspace,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `workspace.query_len` tokens a sequence, as `paged_attention_extend` defines it.

    query `[num_seqs * query_len, num_heads, head_dim]`; seq_lens `[num_seqs]` int32 count the
    query tokens; rows of length 0 are padding and get zeros. The caller has run
    `build_decode_schedule(seq_lens, workspace)` in this step. Valid inside a CUDA graph for any
    lengths. ValueError on shapes, dtypes, devices or layouts that do not fit.
    """
    out = torch.empty_like(query) if out is None else out
    num_kv_heads, block_size, head_dim = check_attention(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        out=out,
    )
    num_seqs, num_heads = seq_lens.shape[0], query.shape[1]
    have = (num_heads, num_kv_heads, head_dim, window)
    want = (workspace.num_heads, workspace.num_kv_heads, workspace.head_dim, workspace.window)
    require(have == want, f"(heads, kv heads, head_dim, window) {have}, but workspace has {want}")
    require(
        query.shape[0] == num_seqs * workspace.query_len,
        f"{query.shape[0]} query rows are not {num_seqs} sequences of {workspace.query_len}",
    )
    require(
        num_seqs <= workspace.max_num_seqs,
        f"{num_seqs} sequences do not fit a workspace for {workspace.max_num_seqs}",
    )
    require_launchable(query=query, workspace=workspace.items)
    if num_seqs == 0:
        return out
    group = num_heads // num_kv_heads
    rows_pad = triton.next_power_of_2(workspace.query_len * group)
    dim_pad = triton.next_power_of_2(head_dim)
    config = workspace.config
    _paged_attention_decode_kernel[(num_kv_heads, num_seqs + workspace.slots)](
        out,
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        sinks,
        workspace.items,
        workspace.partials,
        workspace.log_sums,
        workspace.arrived,
        scale,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        block_table.stride(0),
        workspace.items.stride(0),
        HAS_SINKS=sinks is not None,
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        QUERY_LEN=workspace.query_len,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        DIM_PAD=dim_pad,
        ROWS_PAD=rows_pad,
        MERGE=max(1, 2048 * config.num_warps // (rows_pad * dim_pad)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        PREFETCH=config.prefetch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
