"""Attention on the CPU over paged K and V, compiled by Numba: reads them where they lie.

A tile is some queries of one sequence times the heads that share a KV head; its keys go by in tiles
too, with the softmax carried along ("FlashAttention", arXiv 2205.14135):

    queries of a tile × its heads   [rows, head_dim]   ─┐  scores [rows, KEYS] ─ softmax ─┐
    KEYS keys of one KV head        [KEYS, head_dim]   ─┘                                 ├─ sums
    their values                    [KEYS, head_dim]   ───────────────────────────────────┘

A block's keys lie transposed, `[head_dim, block_size]`, so that a vector holds the scores of
several keys at once; its values `[block_size, head_dim]`. A tile of many rows copies the keys and
values of its blocks together, one of a few rows, a decode's, reads them in their blocks: to copy
them took longer than to multiply.

Threads take tiles as they get free, longest first: one of them may have lost its core to the HTTP
process.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .cpu_numbers import (
    FAST,
    INLINED,
    LANES,
    PARALLEL,
    exp,
    fetch_add,
    stay_apart,
    store,
    to_float,
)
from .cpu_panels import (
    PANEL_COLUMNS,
    PANEL_ROWS,
    WIDE_COLUMNS,
    WIDE_VECTORS,
    copy_lanes,
    multiply_add,
    multiply_few,
    prefetch,
)

KEYS = 64
TILE_ROWS = 48
"""Rows of a tile in prefill."""
FEW_ROWS = 8
"""Most rows of a tile that does not copy."""


@njit(**PARALLEL)
def attend(
    query,
    cache,
    block_table,
    starts,
    seq_lens,
    tiles,
    tile_queries,
    scale,
    window,
    softcap,
    sinks,
    has_sinks,
    num_threads,
    out,
):
    """query `[T, heads, D]` → out, like it. starts `[S + 1]`: rows of query by sequence;
    seq_lens `[S]`: keys of each, its queries being the last; tiles `[n, 2]`: (sequence, its first
    query), of tile_queries each; window and softcap are 0 where there is none, sinks `[heads]`.
    """
    counters = np.zeros(1, dtype=np.int64)
    for _ in prange(num_threads):
        _attend_items(
            counters,
            query,
            cache,
            block_table,
            starts,
            seq_lens,
            tiles,
            tile_queries,
            scale,
            window,
            softcap,
            sinks,
            has_sinks,
            out,
        )


@njit(**FAST)
def _attend_items(
    counters,
    query,
    cache,
    block_table,
    starts,
    seq_lens,
    tiles,
    tile_queries,
    scale,
    window,
    softcap,
    sinks,
    has_sinks,
    out,
):
    """One thread's share."""
    kv_heads = cache.shape[2]
    scratch = make_scratch(query.shape[1] // kv_heads * tile_queries, query.shape[2])
    item = fetch_add(counters, 0, 1)
    while item < len(tiles) * kv_heads:
        attend_item(
            item,
            query,
            cache,
            block_table,
            starts,
            seq_lens,
            tiles,
            tile_queries,
            scale,
            window,
            softcap,
            sinks,
            has_sinks,
            out,
            scratch,
        )
        item = fetch_add(counters, 0, 1)


@njit(**FAST)
def make_scratch(rows, head_dim):
    """What a thread needs to attend with tiles of so many rows; see `_attend_tile`."""
    rows, width = _round_up(rows, PANEL_ROWS), _round_up(head_dim, PANEL_COLUMNS)
    return (
        np.zeros((rows, head_dim), dtype=np.float32),
        np.zeros((rows, width), dtype=np.float32),
        np.empty(rows, dtype=np.float32),
        np.empty(rows, dtype=np.float32),
        np.zeros((rows, KEYS), dtype=np.float32),
        np.zeros((head_dim, KEYS), dtype=np.float32),
        np.zeros((KEYS, width), dtype=np.float32),
        np.zeros(WIDE_VECTORS, dtype=np.int64),
    )


@njit(**FAST)
def attend_item(
    item,
    query,
    cache,
    block_table,
    starts,
    seq_lens,
    tiles,
    tile_queries,
    scale,
    window,
    softcap,
    sinks,
    has_sinks,
    out,
    scratch,
):
    """Tile item // kv_heads for KV head item % kv_heads; arguments as of `attend`."""
    stay_apart()
    packed, sums, maxima, totals, scores, keys, values, places = scratch
    kv_heads, head_dim = cache.shape[2], query.shape[2]
    group = query.shape[1] // kv_heads
    tile, kv_head = divmod(item, np.int64(kv_heads))
    sequence, first = tiles[tile, 0], tiles[tile, 1]
    begin = starts[sequence] + first
    left = starts[sequence + 1] - begin
    count = min(np.int64(tile_queries), left)
    for row in range(count * group):
        line, head = query[begin + row // group, kv_head * group + row % group], row % group
        for dim in range(head_dim):
            packed[row, dim] = to_float(line[dim]) * scale
            sums[row, dim] = np.float32(0)
        maxima[row] = sinks[kv_head * group + head] if has_sinks else np.float32(-np.inf)
        totals[row] = np.float32(1) if has_sinks else np.float32(0)
    _attend_tile(
        packed,
        count * group,
        cache,
        kv_head,
        block_table[sequence],
        seq_lens[sequence] - left,
        group,
        window,
        softcap,
        sums,
        maxima,
        totals,
        scores,
        keys,
        values,
        places,
    )
    for row in range(count * group):
        # No keys, no output: a row that only pads a batch.
        inverse = np.float32(1) / totals[row] if totals[row] != 0 else np.float32(0)
        target = out[begin + row // group]
        for dim in range(head_dim):
            store(target, kv_head * group + row % group, dim, sums[row, dim] * inverse)


@njit(**INLINED)
def _round_up(number, multiple):
    return -(-number // multiple) * multiple


@njit(**INLINED)
def _clear(line, begin, end):
    for index in range(begin, end):
        line[index] = np.float32(0)


@njit(**INLINED)
def _attend_tile(
    packed,
    rows,
    cache,
    kv_head,
    blocks,
    position,
    group,
    window,
    softcap,
    sums,
    maxima,
    totals,
    scores,
    keys,
    values,
    places,
):
    """The first `rows` of packed, whose first query stands at `position`, against the keys that
    they see."""
    in_place = rows <= FEW_ROWS and packed.shape[1] % WIDE_COLUMNS == 0
    stop = position + rows // group
    low = max(position + 1 - window, 0) if window > 0 else 0
    for origin in range(low // KEYS * KEYS, stop, KEYS):
        count = min(KEYS, stop - origin)
        for row in range(rows):
            _clear(scores[row], 0, KEYS)
        if in_place:
            _add_scores(packed, rows, cache, kv_head, blocks, origin, count, places, scores)
        else:
            _load_tile(cache, kv_head, blocks, origin, count, keys, values)
            _add_product(packed, keys, packed.shape[1], rows, scores)
        for row in range(rows):
            place = position + row // group
            begin = max(place + 1 - window - origin, 0) if window > 0 else 0
            end = max(min(place + 1 - origin, count), begin)
            line = scores[row]
            if begin < end:
                _soften(row, begin, end, softcap, line, sums, maxima, totals)
            _clear(line, 0, min(begin, KEYS))
            _clear(line, end, KEYS)
        if in_place:
            _add_values(scores, rows, cache, kv_head, blocks, origin, count, places, sums)
        else:
            _add_product(scores, values, count, rows, sums)


@njit(**INLINED)
def _add_scores(packed, rows, cache, kv_head, blocks, origin, count, places, scores):
    """scores[:rows, :count], and some beyond, += packed @ the keys from `origin`."""
    kv_heads, block_size, head_dim = cache.shape[2:]
    last = (origin + count - 1) // block_size
    for at in range(0, count, WIDE_COLUMNS):
        for part in range(WIDE_VECTORS):
            block, offset = divmod(origin + at + part * LANES, block_size)
            line = (blocks[min(block, last)] * kv_heads + kv_head) * head_dim
            places[part] = line * block_size + offset
        multiply_few(packed, 0, cache, places, block_size, head_dim, scores, at, rows)


@njit(**INLINED)
def _add_values(scores, rows, cache, kv_head, blocks, origin, count, places, sums):
    """sums[:rows] += scores[:rows, :count] @ the values from `origin`."""
    kv_heads, block_size, head_dim = cache.shape[2:]
    size = min(block_size, KEYS)
    for at in range(0, count, size):
        block, offset = divmod(origin + at, block_size)
        line = (blocks[block] * kv_heads + kv_head) * block_size + offset
        for column in range(0, head_dim, WIDE_COLUMNS):
            for part in range(WIDE_VECTORS):
                places[part] = cache[0].size + line * head_dim + column + part * LANES
            depth = min(size, count - at)
            multiply_few(scores, at, cache, places, head_dim, depth, sums, column, rows)


@njit(**INLINED)
def _load_tile(cache, kv_head, blocks, origin, count, keys, values):
    """Keys and values from `origin`, a multiple of KEYS; values beyond `count` are not read. Of
    the next tile, asks memory for the same places, if it has them."""
    kv_heads, block_size, head_dim = cache.shape[2:]
    whole, half = head_dim // LANES * LANES, cache[0].size
    for at in range(0, count, min(block_size, KEYS)):
        block, offset = divmod(origin + at, block_size)
        place = (blocks[block] * kv_heads + kv_head) * block_size * head_dim
        next_block = min((origin + at + KEYS) // block_size, len(blocks) - 1)
        next_place = (blocks[next_block] * kv_heads + kv_head) * block_size * head_dim
        for dim in range(head_dim):
            for lane in range(0, min(block_size, KEYS), LANES):
                line = dim * block_size + offset + lane
                prefetch(cache, next_place + line)
                copy_lanes(cache, place + line, keys, dim * KEYS + at + lane)
        for key in range(min(block_size, count - at)):
            line, to = half + (offset + key) * head_dim, (at + key) * values.shape[1]
            for dim in range(0, whole, LANES):
                prefetch(cache, next_place + line + dim)
                copy_lanes(cache, place + line + dim, values, to + dim)
            for dim in range(whole, head_dim):
                values[at + key, dim] = to_float(
                    cache[1, blocks[block], kv_head, offset + key, dim]
                )


@njit(**INLINED)
def _add_product(left, right, depth, rows, out):
    """out[:rows] += left[:rows, :depth] @ right[:depth]."""
    for column in range(0, out.shape[1], PANEL_COLUMNS):
        multiply_add(left, 0, 0, right, 0, column, depth, out, 0, rows)


@njit(**{**FAST, "fastmath": {"nnan", "nsz", "reassoc"}})
def _greatest(numbers):
    """Of float32 numbers. Only a maximum that may overlook a NaN becomes vector instructions; the
    sum over the exponentials still turns into one."""
    greatest = np.float32(-np.inf)
    for index in range(len(numbers)):
        greatest = max(greatest, numbers[index])
    return greatest


@njit(**FAST)
def _soften(row, begin, end, softcap, scores, sums, maxima, totals):
    """Scores [begin, end) → weights, relative to the greatest score so far."""
    if softcap > 0:
        for key in range(begin, end):
            # tanh(x) = 1 - 2 / (e^2x + 1)
            power = exp(np.float32(2) * scores[key] / softcap)
            scores[key] = softcap * (np.float32(1) - np.float32(2) / (power + np.float32(1)))
    visible = scores[begin:end]
    greatest = max(maxima[row], _greatest(visible))
    total = np.float32(0)
    for key in range(len(visible)):
        visible[key] = exp(visible[key] - greatest)
        total += visible[key]
    if greatest > maxima[row]:
        shrink = exp(maxima[row] - greatest)
        totals[row] *= shrink
        for dim in range(sums.shape[1]):
            sums[row, dim] *= shrink
        maxima[row] = greatest
    totals[row] += total
