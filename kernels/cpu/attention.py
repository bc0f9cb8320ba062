"""Attention on the CPU over paged K and V, compiled by Numba: reads them where they lie.

A tile is some queries of one sequence times the heads that share a KV head; its keys go by in tiles
too, with the softmax carried along ("FlashAttention", arXiv 2205.14135):

    queries of a tile × its heads   [rows, head_dim]   ─┐  scores [rows, KEYS] ─ softmax ─┐
    KEYS keys of one KV head        [KEYS, head_dim]   ─┘                                 ├─ sums
    their values                    [KEYS, head_dim]   ───────────────────────────────────┘

A block's keys lie transposed, `[head_dim, block_size]`, so that a vector holds the scores of
several keys at once; its values `[block_size, head_dim]`. Both are read in their blocks: to copy
them together took longer than it saved, even for a tile of many rows.

Decodes that share a prefix may be members of one tile: it reads the prefix for all of them, then
for each the keys of its own. Every sum runs over the keys in one order, whatever is shared.

Threads take tiles as they get free, longest first: one of them may have lost its core to the HTTP
process.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from .numbers import (
    FAST,
    INLINED,
    LANES,
    PARALLEL,
    exp,
    fetch_add,
    prefetch,
    stay_apart,
    store,
    to_float,
)
from .panels import PANEL_COLUMNS, PANEL_VECTORS, multiply_add
from .softmax import KEYS, weigh

PREFETCHED = 256
"""Numbers of a block's keys, and of its values, that are asked for ahead."""
TILE_ROWS = 48
"""Rows of a tile in prefill, or of decodes that share a prefix."""


class Batch(NamedTuple):
    """A step's sequences, cut into tiles.

    block_table `[S, .]`; starts `[S + 1]`: rows of the queries by sequence; seq_lens `[S]`: keys of
    each, its queries being the last. Tile i is members[tiles[i, 0] : tiles[i, 1]], of which each
    is (sequence, its first query) and has up to tile_queries; of several members each has one.
    Their first tiles[i, 2] keys, a multiple of KEYS, lie in the same blocks and are read once;
    where there is a window, by each member.
    """

    block_table: Any
    starts: Any
    seq_lens: Any
    tiles: Any
    members: Any
    tile_queries: int


class Scoring(NamedTuple):
    """Of one layer: window and softcap are 0 where there is none, sinks `[heads]`."""

    scale: Any
    window: Any
    softcap: Any
    sinks: Any
    has_sinks: bool


@njit(**PARALLEL)
def attend(query, cache, batch, scoring, num_threads, out):
    """query `[T, heads, D]` → out, like it."""
    counters = np.zeros(1, dtype=np.int64)
    for _ in prange(num_threads):
        _attend_items(counters, query, cache, batch, scoring, out)


@njit(**FAST)
def _attend_items(counters, query, cache, batch, scoring, out):
    """One thread's share."""
    kv_heads = cache.shape[2]
    scratch = make_scratch(query.shape[1] // kv_heads * batch.tile_queries, query.shape[2])
    item = fetch_add(counters, 0, 1)
    while item < len(batch.tiles) * kv_heads:
        attend_item(item, query, cache, batch, scoring, out, scratch)
        item = fetch_add(counters, 0, 1)


@njit(**FAST)
def make_scratch(rows, head_dim):
    """What a thread needs to attend with tiles of so many rows: by row its query, weighted sum of
    values, greatest score, sum of weights, and scores of one tile of keys; the keys' places."""
    return (
        np.zeros((rows, head_dim), dtype=np.float32),
        np.zeros((rows, head_dim), dtype=np.float32),
        np.empty(rows, dtype=np.float32),
        np.empty(rows, dtype=np.float32),
        np.empty((rows, KEYS), dtype=np.float32),
        np.zeros(KEYS, dtype=np.int64),
    )


@njit(**FAST)
def attend_item(item, query, cache, batch, scoring, out, scratch):
    """Tile item // kv_heads for KV head item % kv_heads."""
    stay_apart()
    packed, sums, maxima, totals, scores, places = scratch
    kv_heads = np.int64(cache.shape[2])
    group = query.shape[1] // kv_heads
    tile, kv_head = divmod(item, kv_heads)
    begin, end, shared = batch.tiles[tile, 0], batch.tiles[tile, 1], batch.tiles[tile, 2]
    if scoring.window > 0:
        shared = np.int64(0)
    rows = 0
    for member in range(begin, end):
        first, count, _ = _queries_of(batch, member)
        for row in range(count * group):
            head = kv_head * group + row % group
            _begin_row(query[first + row // group, head], head, scoring, rows + row, scratch)
        rows += count * group
    if shared > 0:  # every query comes after them
        blocks = batch.block_table[batch.members[begin, 0]]
        lines = (packed, sums, maxima, totals)
        _attend_keys(
            lines, rows, cache, kv_head, blocks, 0, shared, shared, group, scoring, scores, places
        )
    rows = 0
    for member in range(begin, end):
        first, count, position = _queries_of(batch, member)
        blocks = batch.block_table[batch.members[member, 0]]
        lines = (packed[rows:], sums[rows:], maxima[rows:], totals[rows:])
        stop, new = position + count, count * group
        _attend_keys(
            lines,
            new,
            cache,
            kv_head,
            blocks,
            shared,
            stop,
            position,
            group,
            scoring,
            scores,
            places,
        )
        for row in range(new):
            # No keys, no output: a row that only pads a batch.
            total = totals[rows + row]
            inverse = np.float32(1) / total if total != 0 else np.float32(0)
            target, head = out[first + row // group], kv_head * group + row % group
            for dim in range(query.shape[2]):
                store(target, head, dim, sums[rows + row, dim] * inverse)
        rows += new


@njit(**INLINED)
def _queries_of(batch, member):
    """Row of its first query, how many, position of the first."""
    sequence, skipped = batch.members[member, 0], batch.members[member, 1]
    first = batch.starts[sequence] + skipped
    left = batch.starts[sequence + 1] - first
    return first, min(np.int64(batch.tile_queries), left), batch.seq_lens[sequence] - left


@njit(**INLINED)
def _begin_row(query, head, scoring, row, scratch):
    packed, sums, maxima, totals = scratch[0], scratch[1], scratch[2], scratch[3]
    for dim in range(len(query)):
        packed[row, dim] = to_float(query[dim]) * scoring.scale
        sums[row, dim] = np.float32(0)
    maxima[row] = scoring.sinks[head] if scoring.has_sinks else np.float32(-np.inf)
    totals[row] = np.float32(1) if scoring.has_sinks else np.float32(0)


@njit(**FAST)
def _attend_keys(
    lines, rows, cache, kv_head, blocks, low, stop, position, group, scoring, scores, places
):
    """The first `rows` of lines, whose first query stands at `position`, against the keys that they
    see of those from `low`, a multiple of KEYS, to `stop`."""
    stay_apart()
    packed, sums, maxima, totals = lines
    window = scoring.window
    if window > 0:
        low = max(position + 1 - window, 0) // KEYS * KEYS
    for origin in range(low, stop, KEYS):
        count = min(KEYS, stop - origin)
        _prefetch_keys(cache, kv_head, blocks, origin + KEYS, min(KEYS, stop - origin - KEYS))
        _add_scores(packed, rows, cache, kv_head, blocks, origin, count, places, scores)
        for row in range(rows):
            place = position + row // group
            begin = max(place + 1 - window - origin, 0) if window > 0 else 0
            end = min(place + 1 - origin, count)
            if scoring.softcap > 0:
                _cap(scores[row], scoring.softcap)
            greatest, total = weigh(scores, row, begin, end, maxima[row])
            if greatest > maxima[row]:
                shrink = exp(maxima[row] - greatest)
                totals[row] *= shrink
                for dim in range(sums.shape[1]):
                    sums[row, dim] *= shrink
                maxima[row] = greatest
            totals[row] += total
        _add_values(scores, rows, cache, kv_head, blocks, origin, count, places, sums)


@njit(**INLINED)
def _prefetch_keys(cache, kv_head, blocks, origin, count):
    """Ask for the beginnings of the blocks of `count` keys from `origin` and of their values. What
    follows them the processor then sees coming; a block's beginning it cannot guess."""
    kv_heads, block_size, head_dim = cache.shape[2:]
    for key in range(origin, origin + count, min(block_size, KEYS)):
        block, offset = divmod(key, block_size)
        begin = (blocks[block] * kv_heads + kv_head) * block_size * head_dim
        for line in range(0, min(PREFETCHED, block_size * head_dim), LANES):
            prefetch(cache, begin + offset + line)
            prefetch(cache, cache[0].size + begin + offset * head_dim + line)


@njit(**INLINED)
def _add_scores(packed, rows, cache, kv_head, blocks, origin, count, places, scores):
    """scores[:rows, :count] = packed @ the keys from `origin`; some beyond may be any number."""
    kv_heads, block_size, head_dim = cache.shape[2:]
    last = (origin + count - 1) // block_size
    for at in range(0, count, PANEL_COLUMNS):
        for part in range(PANEL_VECTORS):
            block, offset = divmod(origin + at + part * LANES, block_size)
            line = (blocks[min(block, last)] * kv_heads + kv_head) * head_dim
            places[part] = line * block_size + offset
        for row in range(rows):
            for column in range(at, at + PANEL_COLUMNS):
                scores[row, column] = np.float32(0)
        multiply_add(packed, 0, 0, cache, places, block_size, head_dim, scores, 0, at, rows)


@njit(**INLINED)
def _add_values(scores, rows, cache, kv_head, blocks, origin, count, lines, sums):
    """sums[:rows] += scores[:rows, :count] @ the values from `origin`."""
    kv_heads, block_size, head_dim = cache.shape[2:]
    for key in range(count):
        block, offset = divmod(origin + key, block_size)
        lines[key] = ((blocks[block] * kv_heads + kv_head) * block_size + offset) * head_dim
    whole = head_dim // PANEL_COLUMNS * PANEL_COLUMNS
    for column in range(0, whole, PANEL_COLUMNS):
        first = cache[0].size + column
        multiply_add(scores, 0, 0, cache, first, lines, count, sums, 0, column, rows)
    if whole < head_dim:  # what fills no panel
        for key in range(count):
            block, offset = divmod(origin + key, block_size)
            values = cache[1, blocks[block], kv_head, offset]
            for row in range(rows):
                for dim in range(whole, head_dim):
                    sums[row, dim] += scores[row, key] * to_float(values[dim])


@njit(**INLINED)
def _cap(scores, softcap):
    """softcap * tanh(score / softcap), with tanh(x) = 1 - 2 / (e^2x + 1)."""
    for key in range(len(scores)):
        power = exp(np.float32(2) * scores[key] / softcap)
        scores[key] = softcap * (np.float32(1) - np.float32(2) / (power + np.float32(1)))
