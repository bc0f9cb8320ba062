"""Attention on the CPU to latents in blocks: keys whose first numbers are the values.

A tile is as in `kernels/cpu/attention.py`, some queries of one sequence, or one query of each of
several sequences that share a prefix; all of their heads attend to the same keys. An item is a
tile, or the rows that a part of the heads has in it, if there are few tiles for many threads.

A token's line in its block holds its numbers one after the other, as a product with weights wants
values, not keys. So KEYS lines at a time are brought into a thread's own memory as float32, and the
rows' queries lie transposed, so that the product of the two has the scores of a key side by side:

    lines [KEYS, width]  ·  queries [width, rows]        scores, transposed, [KEYS, rows]
    weights [rows, KEYS] ·  lines [KEYS, value_width]    sums of values [rows, value_width]

The softmax is carried along from one KEYS to the next. Every sum runs over its numbers in one
order, whatever else is in the step.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ..attention import TILE_ROWS, Batch, queries_of
from ..kernel import kernel
from ..numbers import INLINED, exp, store, to_float
from ..panels import PANEL_COLUMNS, multiply_add
from ..region import run_calls
from ..softmax import KEYS, weigh


class Latents(NamedTuple):
    """The work of `store_latent`."""

    latents: Any
    """`[T, width]`."""
    slots: Any
    """`[T]`; negative: nowhere."""
    cache: Any
    """`[1, blocks, 1, block_size, width]`."""


class LatentAttention(NamedTuple):
    """The work of `attend_latent_tile`."""

    query: Any
    """`[T, heads, width]`."""
    cache: Any
    """`[1, blocks, 1, block_size, width]`."""
    block_table: Any
    """This and the next five are as in `attention.Batch`."""
    starts: Any
    seq_lens: Any
    tiles: Any
    members: Any
    tile_queries: int
    scale: Any
    parts: int
    """The parts of the heads, which are items of their own."""
    out: Any
    """`[T, heads, value_width]`."""
    packed: Any
    """Scratch of `_make_scratch`, as the rest: a tile's scaled queries `[threads, width, rows]`."""
    lines: Any
    """Lines of the cache `[threads, KEYS, .]`."""
    products: Any
    """Scores, transposed, `[threads, KEYS, rows]`."""
    scores: Any
    """Scores, then weights, `[threads, rows, KEYS]`."""
    sums: Any
    """Weighted sums of values `[threads, rows, .]`, relative to the greatest score so far."""
    totals: Any
    """The greatest scores so far, and the sums of weights so far, `[threads, 2, rows]`."""


def attend_latents(
    query: np.ndarray[Any, Any],
    latents: np.ndarray[Any, Any],
    slots: np.ndarray[Any, Any],
    cache: np.ndarray[Any, Any],
    batch: Batch,
    scale: float,
    num_threads: int,
    out: np.ndarray[Any, Any],
) -> None:
    """Store latents `[T, width]` in their slots (negative: nowhere) of one layer's cache `[1,
    blocks, 1, block_size, width]`, then attend: query `[T, heads, width]` → out `[T, heads,
    value_width]`."""
    _, heads, width = query.shape
    parts = count_parts(heads, batch.tile_queries, len(batch.tiles), num_threads)
    rows = heads // parts * batch.tile_queries
    work = LatentAttention(
        query,
        cache,
        *batch,
        np.float32(scale),
        parts,
        out,
        *_make_scratch(num_threads, rows, width, out.shape[2]),
    )
    calls = [
        ((store_latent, Latents(latents, slots, cache)), len(latents)),
        ((attend_latent_tile, work), len(batch.tiles) * parts),
    ]
    run_calls(calls, len(query), num_threads)


def count_parts(heads: int, tile_queries: int, num_tiles: int, num_threads: int) -> int:
    """Return into how many equal parts the heads are cut: the fewest with at most TILE_ROWS rows a
    tile, and an item for each thread; if that is impossible, one for each head."""
    for parts in range(1, heads):
        is_small = heads // parts * tile_queries <= TILE_ROWS
        if heads % parts == 0 and is_small and num_tiles * parts >= num_threads:
            return parts
    return heads


def _whole(number: int) -> int:
    """Return the next multiple of a panel's columns."""
    return -(-number // PANEL_COLUMNS) * PANEL_COLUMNS


def _make_scratch(
    num_threads: int, rows: int, width: int, value_width: int
) -> tuple[np.ndarray[Any, Any], ...]:
    """Return the last fields of LatentAttention, for tiles of up to `rows` rows. What fills up the
    last panels is computed and dropped; zeros make that fast."""
    columns, values = _whole(rows), _whole(value_width)
    return (
        np.zeros((num_threads, width, columns), dtype=np.float32),
        np.zeros((num_threads, KEYS, max(width, values)), dtype=np.float32),
        np.zeros((num_threads, KEYS, columns), dtype=np.float32),
        np.zeros((num_threads, rows, KEYS), dtype=np.float32),
        np.zeros((num_threads, rows, values), dtype=np.float32),
        np.zeros((num_threads, 2, rows), dtype=np.float32),
    )


@kernel
def store_latent(item, layer, rows, thread, work):
    """Store the latent of token `item`."""
    latent, slot, cache = work.latents[item], work.slots[item], work.cache
    if slot >= 0:
        block, offset = divmod(slot, np.int64(cache.shape[3]))
        lines = cache[0, block, 0]
        for dim in range(len(latent)):
            store(lines, offset, dim, to_float(latent[dim]))


@kernel
def attend_latent_tile(item, layer, _, thread, work):
    """Attend for tile item // parts and a part of the heads."""
    query, out, parts = work.query, work.out, np.int64(work.parts)
    group = np.int64(query.shape[1]) // parts
    tile, part = divmod(item, parts)
    first_head = part * group
    begin, end, shared = work.tiles[tile, 0], work.tiles[tile, 1], work.tiles[tile, 2]
    sums, totals = work.sums[thread], work.totals[thread]
    # 1. Every member's queries into the tile's rows, which are in the members' order.
    num_rows = np.int64(0)
    for member in range(begin, end):
        first, count, _ = queries_of(work, member)
        for row in range(count * group):
            line = query[first + row // group, first_head + row % group]
            _begin_row(line, work, thread, num_rows + row)
        num_rows += count * group
    # 2. The keys that the members share, for all rows at once; then for each member its own. Member
    #    `begin - 1` stands for all of them, so that the code below is compiled once.
    done = np.int64(0)
    for member in range(begin if shared == 0 else begin - 1, end):
        if member < begin:  # every query comes after the shared keys and sees all of them
            blocks = work.block_table[work.members[begin, 0]]
            first, count, position = np.int64(0), num_rows, shared
            low, stop = np.int64(0), shared
        else:
            blocks = work.block_table[work.members[member, 0]]
            first, queries, position = queries_of(work, member)
            count, low, stop = queries * group, shared, position + queries
        for origin in range(low, stop, KEYS):
            keys = min(KEYS, stop - origin)
            _fetch(work, thread, blocks, origin, keys)
            _attend(work, thread, done, count, origin, keys, position, group)
        # 3. The member's rows are complete: divide the sums of values by the sums of weights.
        if member >= begin:
            for row in range(count):
                # No keys, no output: this is a row that only pads a batch.
                total = totals[1, done + row]
                inverse = np.float32(1) / total if total != 0 else np.float32(0)
                target = out[first + row // group]
                for dim in range(out.shape[2]):
                    number = sums[done + row, dim] * inverse
                    store(target, first_head + row % group, dim, number)
            done += count


@njit(**INLINED)
def _begin_row(query, work, thread, row):
    """Start a row: its scaled query in a column, and sums that hold no key yet."""
    packed, sums, totals, scale = (
        work.packed[thread],
        work.sums[thread],
        work.totals[thread],
        work.scale,
    )
    for dim in range(len(query)):
        packed[dim, row] = to_float(query[dim]) * scale
    for dim in range(sums.shape[1]):
        sums[row, dim] = np.float32(0)
    totals[0, row], totals[1, row] = np.float32(-np.inf), np.float32(0)


@njit(**INLINED)
def _fetch(work, thread, blocks, origin, count):
    """Bring `count` lines from `origin` on out of their blocks."""
    lines, cache = work.lines[thread], work.cache
    block_size, width = cache.shape[3], np.uint64(cache.shape[4])
    for key in range(count):
        block, offset = divmod(origin + key, block_size)
        line = cache[0, blocks[block], 0, offset]
        for dim in range(width):
            lines[key, dim] = to_float(line[dim])


@njit(**INLINED)
def _attend(work, thread, begin, num_rows, origin, count, position, group):
    """Attend with `num_rows` rows from `begin`, the first of which is the query at `position`, to
    the `count` lines that were fetched, the first of which is the key at `origin`."""
    packed, lines, products = work.packed[thread], work.lines[thread], work.products[thread]
    scores, sums, totals = work.scores[thread], work.sums[thread], work.totals[thread]
    width, columns, values = packed.shape[0], packed.shape[1], sums.shape[1]
    # 1. The scores of all panels with any of these rows.
    for column in range(begin // PANEL_COLUMNS * PANEL_COLUMNS, begin + num_rows, PANEL_COLUMNS):
        for key in range(count):
            for at in range(column, column + PANEL_COLUMNS):
                products[key, at] = np.float32(0)
        multiply_add(lines, 0, 0, packed, column, columns, width, products, 0, column, count)
    # 2. Online softmax: weights relative to the greatest score so far. If that grows, what has been
    #    summed up so far shrinks.
    for row in range(num_rows):
        line = begin + row
        for key in range(count):
            scores[row, key] = products[key, line]
        seen = min(position + row // group + 1 - origin, count)
        greatest, total = weigh(scores, row, 0, seen, totals[0, line])
        if greatest > totals[0, line]:
            shrink = exp(totals[0, line] - greatest)
            totals[1, line] *= shrink
            for dim in range(values):
                sums[line, dim] *= shrink
            totals[0, line] = greatest
        totals[1, line] += total
    # 3. The values, weighted.
    across = lines.shape[1]
    for column in range(0, values, PANEL_COLUMNS):
        multiply_add(scores, 0, 0, lines, column, across, count, sums, begin, column, num_rows)
