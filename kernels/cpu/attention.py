"""Attention on the CPU over paged K and V, which are read where they lie.

A tile is some queries of one sequence times the heads that share a KV head. Its keys go by in tiles
too, with the softmax carried along (FlashAttention, arXiv 2205.14135; online softmax, Milakov &
Gimelshein, arXiv 1805.02867):

    queries of a tile × its heads   [rows, head_dim]   ─┐  scores [rows, KEYS] ─ softmax ─┐
    KEYS keys of one KV head        [KEYS, head_dim]   ─┘                                 ├─ sums
    their values                    [KEYS, head_dim]   ───────────────────────────────────┘

The keys of a block are stored transposed, `[head_dim, block_size]`, so that a vector holds the
scores of several keys; its values are `[block_size, head_dim]`. Both are read in their blocks:
gathering them first took longer than it saved, even for a tile of many rows.

Decodes that share a prefix may be members of one tile, which reads the prefix once for all of them,
and then for each member the keys of its own. Every sum runs over the keys in one order, whatever is
shared.

An item is one tile for one KV head. Tiles are sorted, those with most work first, and threads take
them as they get free, since one of them may have lost its core to the HTTP process.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from .kernel import kernel
from .numbers import (
    CACHE_LINE,
    FAST_CALLS,
    INLINED,
    LANES,
    exp,
    load_scale,
    prefetch,
    store,
    to_float,
)
from .panels import PANEL_COLUMNS, PANEL_ROWS, PANEL_VECTORS, multiply_add
from .region import launch
from .softmax import KEYS, weigh

TILE_ROWS = 48
"""Rows per tile, in prefill and for decodes that share a prefix."""
_ONLY_PLACE = np.zeros((1, 2), dtype=np.int64)


class Batch(NamedTuple):
    """A step's sequences, cut into tiles."""

    block_table: Any
    """`[S, .]`."""
    starts: Any
    """The first query's row of each sequence, `[S + 1]`."""
    seq_lens: Any
    """Keys of each sequence, of which its queries are the last, `[S]`."""
    tiles: Any
    """Tile i is members[tiles[i, 0] : tiles[i, 1]]. Their first tiles[i, 2] keys, a multiple of
    KEYS, are in the same blocks and are read once; if the layer has a window, by each member."""
    members: Any
    """(sequence, its first query). A tile's only member has up to tile_queries queries, one of
    several members has one."""
    tile_queries: int


class Scoring(NamedTuple):
    """How one layer turns products of Q and K into scores."""

    scale: Any
    window: Any
    """0 if there is none; -c stands for chunks of c keys."""
    softcap: Any
    """0 if there is none."""
    sinks: Any
    """`[heads]`."""
    has_sinks: bool


class Attention(NamedTuple):
    """What the kernel gets: for each of a number of layers, everything that attention reads."""

    query: Any
    """`[T, heads, head_dim]`."""
    cache: Any
    """`[places, 2, blocks, kv_heads, block_size, head_dim]`; of int8 head_dim + 4, with a step for
    each key and each value, as `norms.Heads` stores them."""
    layer_places: Any
    """`[layers, 2]` int64: the group of a layer, which has a block table of its own, and its place
    in the cache."""
    block_table: Any
    """`[groups, S, .]`."""
    starts: Any
    """This and the next four are as in Batch."""
    seq_lens: Any
    tiles: Any
    members: Any
    tile_queries: int
    scales: Any
    """`[layers]` float32."""
    windows: Any
    """`[layers]` int64, as in Scoring."""
    softcap: Any
    """This and the next two are as in Scoring."""
    sinks: Any
    has_sinks: bool
    out: Any
    """Like query."""
    lines: Any
    """Scratch of `make_scratch`, as the rest."""
    totals: Any
    scores: Any
    places: Any


class Rows(NamedTuple):
    """A tile's rows, in a thread's scratch. A row is one query of one head."""

    packed: Any
    """The scaled queries `[., head_dim]`."""
    sums: Any
    """Weighted sums of values `[., head_dim]`, relative to the greatest score so far."""
    maxima: Any
    """The greatest scores so far `[.]`."""
    totals: Any
    """The sums of weights so far `[.]`."""
    scores: Any
    """Scores, then weights, of one tile of keys `[., KEYS]`."""
    places: Any
    """Where the keys, then the values, begin in the cache `[KEYS]`."""


def make_scratch(num_threads: int, rows: int, head_dim: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Return the last fields of Attention, for tiles of up to `rows` rows."""
    return (
        np.empty((num_threads, 2, rows, head_dim), dtype=np.float32),
        np.empty((num_threads, 2, rows), dtype=np.float32),
        np.zeros((num_threads, rows, KEYS), dtype=np.float32),
        np.zeros((num_threads, KEYS), dtype=np.int64),
    )


def attend(
    query: np.ndarray[Any, Any],
    cache: np.ndarray[Any, Any],
    batch: Batch,
    scoring: Scoring,
    num_threads: int,
    out: np.ndarray[Any, Any],
) -> None:
    """Attend in one layer: query `[T, heads, D]` → out, like it; cache `[2, blocks, kv_heads,
    block_size, D]`."""
    kv_heads, head_dim = cache.shape[2], query.shape[2]
    rows = query.shape[1] // kv_heads * batch.tile_queries
    work = Attention(
        query,
        cache[None],
        _ONLY_PLACE,
        *batch._replace(block_table=batch.block_table[None]),
        np.array([scoring.scale], dtype=np.float32),
        np.array([scoring.window], dtype=np.int64),
        np.float32(scoring.softcap),
        scoring.sinks,
        scoring.has_sinks,
        out,
        *make_scratch(num_threads, rows, head_dim),
    )
    launch(attend_tile, work, len(batch.tiles) * kv_heads, len(query), num_threads)


@kernel
def attend_tile(item, layer, _, thread, work):
    """Attend for tile item // kv_heads and KV head item % kv_heads."""
    kind, place = work.layer_places[layer, 0], work.layer_places[layer, 1]
    query, out, cache, window = work.query, work.out, work.cache[place], work.windows[layer]
    tables = work.block_table[kind]
    lines, totals = work.lines[thread], work.totals[thread]
    rows = Rows(lines[0], lines[1], totals[0], totals[1], work.scores[thread], work.places[thread])
    kv_heads = np.int64(cache.shape[2])
    group = query.shape[1] // kv_heads
    tile, kv_head = divmod(item, kv_heads)
    begin, end, shared = work.tiles[tile, 0], work.tiles[tile, 1], work.tiles[tile, 2]
    if window != 0:
        shared = np.int64(0)
    # 1. Every member's queries into the tile's rows, which are in the members' order.
    num_rows = 0
    for member in range(begin, end):
        first, count, _ = queries_of(work, member)
        for row in range(count * group):
            head = kv_head * group + row % group
            _begin_row(query[first + row // group, head], head, work, layer, num_rows + row, rows)
        num_rows += count * group
    # 2. The keys that the members share, for all rows at once; then for each member its own. Member
    #    `begin - 1` stands for all of them, so that the code below is compiled once.
    done = 0
    for member in range(begin if shared == 0 else begin - 1, end):
        if member < begin:  # every query comes after the shared keys and sees all of them
            blocks = tables[work.members[begin, 0]]
            first, count, position = np.int64(0), num_rows, shared
            low, stop = np.int64(0), shared
        else:
            blocks = tables[work.members[member, 0]]
            first, queries, position = queries_of(work, member)
            count, low, stop = queries * group, shared, position + queries
        _attend_keys(
            rows, done, count, cache, kv_head, blocks, low, stop, position, group, window, work
        )
        # 3. The member's rows are complete: divide the sums of values by the sums of weights.
        if member >= begin:
            for row in range(count):
                # No keys, no output: this is a row that only pads a batch.
                total = rows.totals[done + row]
                inverse = np.float32(1) / total if total != 0 else np.float32(0)
                target, head = out[first + row // group], kv_head * group + row % group
                for dim in range(query.shape[2]):
                    store(target, head, dim, rows.sums[done + row, dim] * inverse)
            done += count


@njit(**INLINED)
def queries_of(work, member):
    """Return the row of a member's first query, their number, and the first one's position."""
    sequence, skipped = work.members[member, 0], work.members[member, 1]
    first = np.int64(work.starts[sequence]) + skipped
    left = np.int64(work.starts[sequence + 1]) - first
    return first, min(work.tile_queries, left), np.int64(work.seq_lens[sequence]) - left


@njit(**INLINED)
def _begin_row(query, head, work, layer, row, rows):
    """Start a row: its scaled query, and sums that hold no key yet, only the sink, if any."""
    packed, sums, scale = rows.packed, rows.sums, work.scales[layer]
    for dim in range(len(query)):
        packed[row, dim] = to_float(query[dim]) * scale
        sums[row, dim] = np.float32(0)
    rows.maxima[row] = work.sinks[head] if work.has_sinks else np.float32(-np.inf)
    rows.totals[row] = np.float32(1) if work.has_sinks else np.float32(0)


@njit(**INLINED)
def _attend_keys(
    rows, begin, num_rows, cache, kv_head, blocks, low, stop, position, group, window, work
):
    """Attend with `num_rows` rows from `begin`, the first of which is the query at `position`, to
    the keys that they see of those from `low`, a multiple of KEYS, to `stop`."""
    sums, maxima, totals, scores = rows.sums, rows.maxima, rows.totals, rows.scores
    softcap = work.softcap
    if window != 0:
        low = max(_first_visible(position, window), 0) // KEYS * KEYS
    for origin in range(low, stop, KEYS):
        # 1. What comes next, these heads' or the next head's, is on its way into the cache.
        head, ahead = kv_head, origin + KEYS
        if ahead >= stop:
            head, ahead = kv_head + 1, low
        coming = min(KEYS, stop - ahead) if head < cache.shape[2] else 0
        _prefetch_keys(cache, 0, head, blocks, ahead, coming, num_rows)
        # 2. Scores of this tile of keys.
        count = min(KEYS, stop - origin)
        _add_scores(rows, begin, num_rows, cache, kv_head, blocks, origin, count)
        _scale_scores(rows, num_rows, cache, kv_head, blocks, origin, count, 0)
        for row in range(num_rows):
            # 3. The keys that this row sees: none after its query, none before its window.
            place = position + row // group
            least = max(_first_visible(place, window) - origin, 0) if window != 0 else 0
            most = min(place + 1 - origin, count)
            if softcap > 0:
                _cap(scores[row], softcap)
            # 4. Online softmax: weights relative to the greatest score so far. If that grows,
            #    what has been summed up so far shrinks.
            line = begin + row
            greatest, total = weigh(scores, row, least, most, maxima[line])
            if greatest > maxima[line]:
                shrink = exp(maxima[line] - greatest)
                totals[line] *= shrink
                for dim in range(sums.shape[1]):
                    sums[line, dim] *= shrink
                maxima[line] = greatest
            totals[line] += total
        # 5. The values, weighted.
        _prefetch_keys(cache, 1, head, blocks, ahead, coming, num_rows)
        _scale_scores(rows, num_rows, cache, kv_head, blocks, origin, count, 1)
        _add_values(rows, begin, num_rows, cache, kv_head, blocks, origin, count)


@njit(**INLINED)
def _first_visible(position, window):
    """Return the first key that a query sees, which may lie before all of them: one of the last
    `window`, or of the chunk of -window keys that the query is in."""
    return position + 1 - window if window > 0 else position // -window * -window


@njit(**INLINED)
def _prefetch_keys(cache, half, kv_head, blocks, origin, count, num_rows):
    """Fetch `count` keys (half 0) from `origin`, or their values (half 1), in whole blocks.

    With few rows, which wait for memory, each line is asked for as often as a number has bytes: a
    processor whose queue is full drops what it is asked for.
    """
    kv_heads, block_size, width = cache.shape[2:]
    step = CACHE_LINE // cache.itemsize
    if num_rows < PANEL_ROWS:
        step //= cache.itemsize
    for key in range(origin, origin + count, block_size):
        block = blocks[key // block_size] * kv_heads + kv_head
        begin = half * cache[0].size + block * block_size * width
        for number in range(0, block_size * width, step):
            prefetch(cache, begin + number)


@njit(**INLINED)
def _add_scores(rows, begin, num_rows, cache, kv_head, blocks, origin, count):
    """Compute scores[:num_rows, :count] = packed @ the keys from `origin`; some columns after
    `count` may be any number."""
    packed, scores, places = rows.packed, rows.scores, rows.places
    kv_heads, block_size, width = cache.shape[2:]
    head_dim = packed.shape[1]
    last = (origin + count - 1) // block_size
    for at in range(0, count, PANEL_COLUMNS):
        for part in range(PANEL_VECTORS):
            block, offset = divmod(origin + at + part * LANES, block_size)
            line = (blocks[min(block, last)] * kv_heads + kv_head) * width
            places[part] = line * block_size + offset
        for row in range(num_rows):
            for column in range(at, at + PANEL_COLUMNS):
                scores[row, column] = np.float32(0)
        multiply_add(packed, begin, 0, cache, places, block_size, head_dim, scores, 0, at, num_rows)


@njit(**INLINED)
def _add_values(rows, begin, num_rows, cache, kv_head, blocks, origin, count):
    """Compute sums[begin : begin + num_rows] += scores[:num_rows, :count] @ the values from
    `origin`."""
    scores, sums, lines = rows.scores, rows.sums, rows.places
    kv_heads, block_size, width = cache.shape[2:]
    head_dim = sums.shape[1]
    key = 0
    while key < count:  # a block's lines follow each other; to divide for each key took a fifth
        block, offset = divmod(origin + key, block_size)
        line = ((blocks[block] * kv_heads + kv_head) * block_size + offset) * width
        for at in range(key, min(key + block_size - offset, count)):
            lines[at] = line
            line += width
        key += block_size - offset
    whole = head_dim // PANEL_COLUMNS * PANEL_COLUMNS
    for column in range(0, whole, PANEL_COLUMNS):
        first = cache[0].size + column
        multiply_add(scores, 0, 0, cache, first, lines, count, sums, begin, column, num_rows)
    if whole < head_dim:  # dimensions that fill no panel
        for key in range(count):
            block, offset = divmod(origin + key, block_size)
            values = cache[1, blocks[block], kv_head, offset]
            for row in range(num_rows):
                for dim in range(whole, head_dim):
                    sums[begin + row, dim] += scores[row, key] * to_float(values[dim])


def _scale_scores(rows, num_rows, cache, kv_head, blocks, origin, count, half):
    """Multiply scores[:num_rows, :count] by the steps of the keys (half 0) from `origin`, or of
    their values (half 1), if the cache has steps."""


@overload(_scale_scores, jit_options=FAST_CALLS)
def _scale_scores_of(rows, num_rows, cache, kv_head, blocks, origin, count, half):
    if cache.dtype == types.int8:
        return _scale_by_steps
    return lambda rows, num_rows, cache, kv_head, blocks, origin, count, half: None


def _scale_by_steps(rows, num_rows, cache, kv_head, blocks, origin, count, half):
    scores, steps = rows.scores, rows.places.view(np.float32)  # its memory, in use elsewhere
    kv_heads, block_size, width = cache.shape[2:]
    done = np.int64(0)
    while done < count:
        block, offset = divmod(origin + done, block_size)
        line = (blocks[block] * kv_heads + kv_head) * block_size * width
        place, apart = line + (width - 4) * block_size + 4 * offset, np.int64(4)
        if half == 1:
            place, apart = cache[0].size + line + offset * width + width - 4, np.int64(width)
        for _ in range(min(block_size - offset, count - done)):
            steps[done] = load_scale(cache, place)
            place += apart
            done += 1
    for row in range(num_rows):
        for key in range(count):
            scores[row, key] *= steps[key]


@njit(**INLINED)
def _cap(scores, softcap):
    """Compute softcap * tanh(score / softcap), with tanh(x) = 1 - 2 / (e^2x + 1)."""
    factor = np.float32(2) / softcap
    for key in range(len(scores)):
        power = exp(factor * scores[key])
        scores[key] = softcap * (np.float32(1) - np.float32(2) / (power + np.float32(1)))
