"""Causal attention of several new tokens per sequence over its cached blocks: chunked prefill.

    out = softmax(scale · Q·Kᵀ, masked) · V,   K and V through the block table (PagedAttention,
                                               arXiv 2309.06180), as in FlashAttention-2 (arXiv
                                               2307.08691) by the recurrence of attend_tiles.py

The query rows of the heads that share a kv head are packed: row r of a sequence is token r // group
and head r % group. A tile holds BLOCK_M rows for any group size, and every K/V tile is read once
for all heads of the group.

    grid (kv head, tile)   the tiles of all sequences on one axis, the last (longest) first
    keys   |-- window's edge, masked --|---- full tiles, no mask ----|-- causal edge, masked --|
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ...checks import (
    check_attention,
    once_a_signature,
    require,
    require_contiguous,
    require_dtype,
    require_launchable,
    require_shape,
)
from ..fp8 import check_scales, load_scale, readable_view
from ..tuning import TileConfig, extend_config
from .attend_tiles import (
    LOG2E,
    LOWEST,
    attend_tiles,
    finish_rows,
    first_visible,
    load_query,
    start_rows,
    store_rows,
)

# Triton must not compile again when a step's metadata has another stride or address.
UNSPECIALIZED = ["num_seqs", "table_stride"]
UNALIGNED = ["block_table_ptr", "query_start_loc_ptr", "seq_lens_ptr"]


@triton.jit
def _find_sequence(query_start_loc_ptr, tile, num_seqs, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the sequence that owns `tile` and the first of its tiles, by bisection.

    Sequence s owns the tiles from start[s] * GROUP // BLOCK_M + s up to the next sequence's. They
    are never fewer than it needs, and no pass over the lengths has to count them.
    """
    low = tl.program_id(0) * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(query_start_loc_ptr + middle) * GROUP // BLOCK_M + middle
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle)
    return low, tl.load(query_start_loc_ptr + low) * GROUP // BLOCK_M + low


# Over 50 lines: 30 parameters.
@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _paged_attention_extend_kernel(
    out_ptr,
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_table_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    sinks_ptr,
    kv_scales_ptr,
    first_seq_ptr,
    num_seqs,
    scale,
    query_stride_t,
    query_stride_h,
    out_stride_t,
    out_stride_h,
    table_stride,
    HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    # 1. Find the sequence and the rows of this tile. Tiles that no row needs return. The last tiles
    #    come first: they see the most keys, and short ones then fill the gaps at the end.
    if first_seq_ptr is not None:
        first_seq = tl.load(first_seq_ptr)
        num_seqs -= first_seq
        query_start_loc_ptr += first_seq
        seq_lens_ptr += first_seq
        block_table_ptr += first_seq.to(tl.int64) * table_stride
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq, first_tile = _find_sequence(query_start_loc_ptr, tile, num_seqs, GROUP, BLOCK_M)
    query_start = tl.load(query_start_loc_ptr + seq)
    query_len = tl.load(query_start_loc_ptr + seq + 1) - query_start
    first_row = (tile - first_tile) * BLOCK_M
    if (first_row < 0) | (first_row >= query_len * GROUP):
        return
    context = tl.load(seq_lens_ptr + seq) - query_len

    # 2. Load the query rows. A sink is a key with that logit and no value.
    row = first_row + tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = token < query_len
    query = load_query(query_ptr, key_cache_ptr, query_start + token, head, live, query_stride_t,
                       query_stride_h, HEAD_DIM, DIM_PAD)  # fmt: skip
    rotary = query
    if ROPE_DIM > 0:
        rotary = load_query(query_ptr + HEAD_DIM, key_cache_ptr, query_start + token, head, live,
                            query_stride_t, query_stride_h, ROPE_DIM, ROPE_PAD)  # fmt: skip
    key_scale = load_scale(kv_scales_ptr, 0, kv_head, NUM_KV_HEADS)
    value_scale = load_scale(kv_scales_ptr, 1, kv_head, NUM_KV_HEADS)
    if key_scale is not None:
        scale *= key_scale
    acc, row_max, row_sum = start_rows(BLOCK_M, DIM_PAD)
    if HAS_SINKS:
        row_max = tl.maximum(tl.load(sinks_ptr + head).to(tl.float32) * LOG2E, LOWEST)
        row_sum += 1.0

    # 3. Fold the keys in three ranges: up to `full_begin` some keys are outside some rows' windows,
    #    up to `full_end` every row sees every key, and up to `kv_end` the causal mask applies. So
    #    only the tiles at the two edges pay for a mask. If values are wider than 256, all do: their
    #    products take long enough, and the registers of three loops would spill.
    first_position = context + first_row // GROUP
    last_position = context + tl.minimum((first_row + BLOCK_M - 1) // GROUP, query_len - 1)
    kv_end = last_position + 1
    full_end = tl.maximum(first_position + 1, 0) // BLOCK_N * BLOCK_N
    full_begin = 0
    table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride
    positions = context + token
    if DIM_PAD > 256:
        full_end = 0
        if WINDOW != 0:
            full_end = tl.maximum(first_visible(first_position, WINDOW), 0) // BLOCK_N * BLOCK_N
    elif WINDOW != 0:
        begin = tl.maximum(first_visible(first_position, WINDOW), 0) // BLOCK_N * BLOCK_N
        full_begin = tl.maximum(first_visible(last_position, WINDOW), 0)
        full_begin = tl.cdiv(full_begin, BLOCK_N) * BLOCK_N
        full_begin = tl.minimum(full_begin, full_end)
        acc, row_max, row_sum = attend_tiles(
            acc, row_max, row_sum, query, rotary, key_cache_ptr, value_cache_ptr, table_ptr,
            kv_head, positions, begin, full_begin, kv_end, scale, True, WINDOW, SOFTCAP,
            NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, DIM_PAD, BLOCK_N, ROPE_DIM, ROPE_PAD, PREFETCH,
        )  # fmt: skip
    if DIM_PAD <= 256:
        acc, row_max, row_sum = attend_tiles(
            acc, row_max, row_sum, query, rotary, key_cache_ptr, value_cache_ptr, table_ptr,
            kv_head, positions, full_begin, full_end, kv_end, scale, False, WINDOW, SOFTCAP,
            NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, DIM_PAD, BLOCK_N, ROPE_DIM, ROPE_PAD, PREFETCH,
        )  # fmt: skip
    acc, row_max, row_sum = attend_tiles(
        acc, row_max, row_sum, query, rotary, key_cache_ptr, value_cache_ptr, table_ptr, kv_head,
        positions, full_end, kv_end, kv_end, scale, True, WINDOW, SOFTCAP, NUM_KV_HEADS,
        BLOCK_SIZE, HEAD_DIM, DIM_PAD, BLOCK_N, ROPE_DIM, ROPE_PAD, PREFETCH,
    )  # fmt: skip
    # 4. Divide by the softmax denominators and write the rows.
    acc, _ = finish_rows(acc, row_max, row_sum, value_scale)
    store_rows(out_ptr, acc, query_start + token, head, live, out_stride_t, out_stride_h, HEAD_DIM,
               DIM_PAD)  # fmt: skip


@once_a_signature
def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    kv_scales: torch.Tensor | None,
    first_seq: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    value_width: int | None,
) -> None:
    num_kv_heads, _, _ = check_attention(
        query, key_cache, value_cache, block_table, seq_lens, scale=scale, window=window,
        softcap=softcap, sinks=sinks, out=out, value_width=value_width,
    )  # fmt: skip
    check_scales(kv_scales, key_cache, num_kv_heads)
    require_dtype("query_start_loc", query_start_loc, torch.int32)
    require_shape("query_start_loc", query_start_loc, seq_lens.shape[0] + 1)
    require_contiguous("query_start_loc", query_start_loc)
    if first_seq is not None:
        require_dtype("first_seq", first_seq, torch.int32)
        require_shape("first_seq", first_seq, 1)
    require_launchable(
        query=query, query_start_loc=query_start_loc, kv_scales=kv_scales, first_seq=first_seq
    )


def paged_attention_extend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: TileConfig | None = None,
    kv_scales: torch.Tensor | None = None,
    first_seq: torch.Tensor | None = None,
    max_seqs: int | None = None,
    value_width: int | None = None,
) -> torch.Tensor:  # over 50 lines: 17 parameters to describe, check and pass on
    """Compute causal attention of packed queries over their sequences' cached blocks.

    query `[num_tokens, num_heads, head_dim]` holds sequence s in rows
    query_start_loc[s]:query_start_loc[s + 1] (int32). Its token i is at position seq_lens[s] -
    query_len[s] + i and sees key j iff j <= position and, with a window, position - j < window; a
    window of -c is a chunk: j >= position // c * c. key_cache and value_cache are one layer's
    `[num_blocks, num_kv_heads, block_size, head_dim]`, block_table is `[num_seqs, max_blocks]`
    int32. softcap c replaces a score x by c·tanh(x / c). sinks `[num_heads]` add one logit per head
    to the denominator of the softmax only. With a float8_e4m3fn cache, K and V are the cache times
    kv_scales (`[2, num_kv_heads]` float32, default 1). Rows of `out` before query_start_loc[0] and
    from query_start_loc[-1] on are left as they are. max_query_len is an upper bound of every
    query_len and only picks the tile, which `config` overrides. first_seq `[1]` int32 on the device
    leaves the sequences before it out, as if the slices of the others were passed; of those at most
    max_seqs have tokens, without which there is a tile for each sequence. A CUDA graph of that is
    valid for any first_seq and lengths. A cache of latents (attend_tiles.py) is key_cache alone,
    with one kv head; value_width says how many numbers of a key are the value, and `out` has as
    many. Raises ValueError on shapes, dtypes, devices or layouts that do not fit.
    """
    if out is None:
        out = query.new_empty(*query.shape[:2], value_width or query.shape[2])
    _check(
        query, key_cache, value_cache, block_table, query_start_loc, seq_lens, out, sinks,
        kv_scales, first_seq, scale, window, softcap, value_width,
    )  # fmt: skip
    require(max_query_len > 0, f"max_query_len must be positive, not {max_query_len}")
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    num_seqs = seq_lens.shape[0]
    num_tokens, num_heads, _ = query.shape
    if num_tokens == 0 or num_seqs == 0:
        return out
    group = num_heads // num_kv_heads
    rows, width = max_query_len * group, value_width or head_dim
    config = config or extend_config(width, query.dtype, rows, query.device)
    num_tiles = num_tokens * group // config.block_m + (max_seqs or num_seqs)
    values = None if value_cache is None else readable_view(value_cache)
    _paged_attention_extend_kernel[(num_kv_heads, num_tiles)](
        out, query, readable_view(key_cache), values, block_table, query_start_loc, seq_lens, sinks,
        kv_scales, first_seq, num_seqs, scale, query.stride(0), query.stride(1), out.stride(0),
        out.stride(1), block_table.stride(0),
        HAS_SINKS=sinks is not None,
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_SIZE=block_size,
        HEAD_DIM=width,
        DIM_PAD=triton.next_power_of_2(width),
        ROPE_DIM=head_dim - width,
        ROPE_PAD=max(16, triton.next_power_of_2(head_dim - width)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        PREFETCH=config.prefetch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return out
