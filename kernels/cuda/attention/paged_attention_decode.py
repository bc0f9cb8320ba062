"""Attention of one or a few new tokens per sequence over its cached blocks, with split keys.

    out = softmax(scale · q·Kᵀ) · V,   K and V through the block table (PagedAttention, arXiv
                                       2309.06180), by the online softmax of attend_tiles.py

The time is that of reading K and V, so they are read once: the query heads of a group (those that
share a kv head) form one tile. The keys of a step are spread over the GPU by tokens and not by
sequences (Flash-Decoding's split keys, with the list of decode_schedule.py). The grid is (kv head,
item), and a program folds one chunk of keys:

    a sequence with one split   → the program writes `out`
    with several                → each writes its partial result and log-sum, and the last one to
                                  finish merges all of them
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ...checks import check_attention, once_a_signature, require, require_launchable
from ..dependent_launch import begin_program, launch_options
from ..fp8 import E4M3, check_scales, has_room_to_widen, load_scale, readable_view
from .attend_tiles import (
    LOG2E,
    LOWEST,
    attend_tiles,
    finish_rows,
    load_query,
    merge_partials,
    start_rows,
    store_partial,
    store_rows,
)
from .cascade import CascadeWorkspace, attend_prefixes
from .decode_schedule import DecodeWorkspace

MAX_REGISTERS = {4: 168}
"""Registers per thread, by num_warps: the budget when three programs share an SM. Without the hint
ptxas targets 128, to fit a fourth that shared memory cannot hold, and spills."""


# Over 50 lines: 43 parameters.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr"],
)
def _paged_attention_decode_kernel(
    out_ptr,
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_table_ptr,
    seq_lens_ptr,
    sinks_ptr,
    kv_scales_ptr,
    items_ptr,
    partials_ptr,
    log_sums_ptr,
    arrived_ptr,
    prefixes_ptr,
    prefix_partials_ptr,
    prefix_log_sums_ptr,
    scale,
    query_stride_t,
    query_stride_h,
    out_stride_t,
    out_stride_h,
    table_stride,
    items_stride,
    prefixes_stride,
    HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    MERGE: tl.constexpr,
    MERGE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PREFETCH: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PDL: tl.constexpr,
):
    begin_program(PDL)
    # 1. Read the item: which sequence, which of its keys, and whether other programs (splits, or
    #    those of a shared prefix) have parts of the result.
    ROWS: tl.constexpr = QUERY_LEN * GROUP
    CASCADE: tl.constexpr = prefixes_ptr is not None
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    seq = tl.load(items_ptr + item)
    if seq < 0:
        return
    begin = tl.load(items_ptr + items_stride + item)
    end = tl.load(items_ptr + 2 * items_stride + item)
    first_item = tl.load(items_ptr + 3 * items_stride + item)
    splits = tl.load(items_ptr + 4 * items_stride + item)
    prefix_splits = 0
    if CASCADE:
        prefix_splits = tl.load(prefixes_ptr + 2 * prefixes_stride + seq)

    # 2. The tile of query rows: all tokens of the sequence times all heads of the group.
    row = tl.arange(0, BLOCK_M)
    token = seq * QUERY_LEN + row // GROUP
    head = kv_head * GROUP + row % GROUP
    query = load_query(query_ptr, key_cache_ptr, token, head, row < ROWS, query_stride_t,
                       query_stride_h, HEAD_DIM, DIM_PAD)  # fmt: skip
    rotary = query
    if ROPE_DIM > 0:
        rotary = load_query(query_ptr + HEAD_DIM, key_cache_ptr, token, head, row < ROWS,
                            query_stride_t, query_stride_h, ROPE_DIM, ROPE_PAD)  # fmt: skip
    cache_head = kv_head if SHARE == 1 else kv_head // SHARE
    CACHE_HEADS: tl.constexpr = NUM_KV_HEADS // SHARE
    key_scale = load_scale(kv_scales_ptr, 0, cache_head, CACHE_HEADS)
    value_scale = load_scale(kv_scales_ptr, 1, cache_head, CACHE_HEADS)
    if key_scale is not None:
        scale *= key_scale
    positions = tl.load(seq_lens_ptr + seq) - QUERY_LEN + row // GROUP
    # 3. Fold the chunk of keys. A sink is a key with that logit and no value. It must count once,
    #    so only the sequence's first item starts with it.
    acc, row_max, row_sum = start_rows(BLOCK_M, DIM_PAD)
    if HAS_SINKS and item == first_item:
        sink = tl.load(sinks_ptr + head, mask=row < ROWS, other=0.0).to(tl.float32)
        row_max = tl.maximum(sink * LOG2E, LOWEST)
        row_sum += 1.0
    table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride
    acc, row_max, row_sum = attend_tiles(
        acc, row_max, row_sum, query, rotary, key_cache_ptr, value_cache_ptr, table_ptr,
        cache_head, positions, begin, end, end, scale, True, WINDOW, SOFTCAP, CACHE_HEADS,
        BLOCK_SIZE, HEAD_DIM, DIM_PAD, BLOCK_N, ROPE_DIM, ROPE_PAD, PREFETCH, IN_PLACE,
    )  # fmt: skip
    acc, log_sum = finish_rows(acc, row_max, row_sum, value_scale)
    # 4. A sequence in one piece is done.
    if splits + prefix_splits == 1:
        store_rows(out_ptr, acc, token, head, row < ROWS, out_stride_t, out_stride_h, HEAD_DIM,
                   DIM_PAD)  # fmt: skip
        return
    # 5. Otherwise store the partial result, then count this program as arrived. The barrier puts
    #    the stores of all warps before the counter's release; its acquire puts the other programs'
    #    stores before the loads of the merge.
    line = (item.to(tl.int64) * NUM_KV_HEADS + kv_head) * ROWS + row
    store_partial(partials_ptr, log_sums_ptr, line, row < ROWS, acc, log_sum, HEAD_DIM, DIM_PAD)
    tl.debug_barrier()
    arrived_ptr += seq * NUM_KV_HEADS + kv_head
    before = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    # 6. The last program of the sequence to arrive merges, and resets the counter for the next
    #    launch. The partial results of a shared prefix are there: an earlier launch wrote them.
    if before == splits - 1:
        first_prefix = 0
        if CASCADE:
            first_prefix = tl.load(prefixes_ptr + prefixes_stride + seq)
        few = tl.arange(0, ROWS_PAD)
        for column in range(0, HEAD_DIM, MERGE_DIM):
            merged = merge_partials(
                partials_ptr, log_sums_ptr, first_item, splits, prefix_partials_ptr,
                prefix_log_sums_ptr, first_prefix, prefix_splits, kv_head, column, NUM_KV_HEADS,
                ROWS, ROWS_PAD, HEAD_DIM, MERGE_DIM, MERGE,
            )  # fmt: skip
            store_rows(
                out_ptr, merged, seq * QUERY_LEN + few // GROUP, kv_head * GROUP + few % GROUP,
                few < ROWS, out_stride_t, out_stride_h, HEAD_DIM, MERGE_DIM, column,
            )  # fmt: skip
        tl.store(arrived_ptr, 0)


@once_a_signature
def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    kv_scales: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    value_width: int | None,
    allocated: tuple[int, int, int, int | None, int | None],
    items: torch.Tensor,
    max_num_seqs: int,
    query_len: int,
    cascade: tuple[torch.device, int, int] | None,
) -> None:
    """`allocated` is the workspace's (heads, kv heads, head_dim, value_width, window); `cascade`
    its device, its number of rows and its query_len."""
    num_kv_heads, _, head_dim = check_attention(
        query, key_cache, value_cache, block_table, seq_lens, scale=scale, window=window,
        softcap=softcap, sinks=sinks, out=out, value_width=value_width,
    )  # fmt: skip
    check_scales(kv_scales, key_cache, num_kv_heads)
    num_rows, num_heads, _ = query.shape
    num_seqs = seq_lens.shape[0]
    have = (num_heads, num_kv_heads, head_dim, value_width, window)
    require(
        have == allocated,
        f"(heads, kv heads, head_dim, value_width, window) is {have}, workspace has {allocated}",
    )
    require(
        num_rows == num_seqs * query_len,
        f"{num_rows} query rows are not {num_seqs} sequences of {query_len}",
    )
    require(
        num_seqs <= max_num_seqs, f"{num_seqs} sequences do not fit a workspace for {max_num_seqs}"
    )
    require_launchable(query=query, workspace=items, kv_scales=kv_scales)
    if cascade is not None:
        device, num_members, cascade_query_len = cascade
        require(num_seqs <= num_members, "cascade is for fewer sequences")
        require(cascade_query_len == query_len, "cascade has another query_len")
        require(device == query.device, f"query is on {query.device}, cascade on {device}")


def paged_attention_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    workspace: DecodeWorkspace,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
    cascade: CascadeWorkspace | None = None,
    pdl: bool = False,
    value_width: int | None = None,
) -> torch.Tensor:  # over 50 lines: 15 parameters to describe, check and pass on
    """Compute what `paged_attention_extend` defines, for query_len new tokens per sequence.

    query is `[num_seqs * query_len, num_heads, head_dim]` with the query_len of `workspace`;
    seq_lens `[num_seqs]` int32 include the query tokens; a row of length 0 is padding and gets
    zeros. The caller has run `build_decode_schedule` with the same seq_lens and workspace in this
    step, and with `prefix_lens=cascade.prefix_lens` if a cascade is given. With `cascade` (not for
    windows), a first launch folds the shared prefixes, once per group. A CUDA graph of this is
    valid for any lengths and groups. `pdl` launches it as dependent_launch.py says. The other
    parameters are those of `paged_attention_extend`. Raises ValueError on shapes, dtypes, devices
    or layouts that do not fit.
    """
    if out is None:
        out = query.new_empty(*query.shape[:2], value_width or query.shape[2])
    of_cascade = None
    if cascade is not None:
        of_cascade = (cascade.plan.device, len(cascade.members), cascade.cost.query_len)
    _check(
        query, key_cache, value_cache, block_table, seq_lens, out, sinks, kv_scales, scale, window,
        softcap, value_width,
        (workspace.num_heads, workspace.num_kv_heads, workspace.head_dim, workspace.value_width,
         workspace.window),
        workspace.items, workspace.max_num_seqs, workspace.query_len, of_cascade,
    )  # fmt: skip
    _, _, block_size, head_dim = key_cache.shape
    width = value_width or head_dim
    num_seqs, num_parts = seq_lens.shape[0], workspace.num_parts
    if num_seqs == 0:
        return out
    if cascade is not None:
        attend_prefixes(
            query, key_cache, value_cache, block_table, scale=scale, cascade=cascade,
            softcap=softcap, kv_scales=kv_scales,
        )  # fmt: skip
    rows_pad = triton.next_power_of_2(workspace.query_len * workspace.group)
    dim_pad = triton.next_power_of_2(width)
    # Merge few columns of wide values at a time, to fit the registers.
    merge_dim, merged = (dim_pad, 2048) if dim_pad <= 256 else (128, 1024)
    config = workspace.config
    values = None if value_cache is None else readable_view(value_cache)
    _paged_attention_decode_kernel[(num_parts, num_seqs + workspace.slots)](
        out, query, readable_view(key_cache), values, block_table, seq_lens, sinks, kv_scales,
        workspace.items, workspace.partials, workspace.log_sums, workspace.arrived,
        None if cascade is None else cascade.prefixes,
        None if cascade is None else cascade.partials,
        None if cascade is None else cascade.log_sums,
        scale, query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        block_table.stride(0), workspace.items.stride(0),
        0 if cascade is None else cascade.prefixes.stride(0),
        HAS_SINKS=sinks is not None,
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        QUERY_LEN=workspace.query_len,
        NUM_KV_HEADS=num_parts,
        GROUP=workspace.group,
        SHARE=workspace.share,
        BLOCK_SIZE=block_size,
        HEAD_DIM=width,
        DIM_PAD=dim_pad,
        ROPE_DIM=head_dim - width,
        ROPE_PAD=max(16, triton.next_power_of_2(head_dim - width)),
        ROWS_PAD=rows_pad,
        MERGE=max(1, merged * config.num_warps // (rows_pad * merge_dim)),
        MERGE_DIM=merge_dim,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        PREFETCH=config.prefetch,
        IN_PLACE=key_cache.dtype == E4M3 and config.in_place and has_room_to_widen(query.device),
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=MAX_REGISTERS.get(config.num_warps),
        **launch_options(pdl),
    )  # fmt: skip
    return out
