"""Products with packed weights on the CPU, compiled by Numba.

W `[out_features, in_features]` lies as panels `[panels, in_features, PANEL_COLUMNS]`, of some
columns of Wᵀ each: a product goes through one from its first number to its last. With them go scale
and bias of each column, `[2, panels * PANEL_COLUMNS]`; scales are 1 but for int8 panels. Each sum
runs over in_features in one order, so that a row comes out the same whatever else is in the batch.

An item is a panel times some rows. What pads the last panel is computed and left out.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .numbers import FAST, INLINED, PARALLEL, exp, fetch_add, stay_apart
from .panels import PANEL_COLUMNS, PANEL_ROWS, multiply_add

ROWS = 16 * PANEL_ROWS
"""Rows of an item: what a panel's weights are read for at a time."""
DEPTH = 1024
"""Of a panel, read for all rows of an item before the next: it stays in the second-level cache."""


@njit(**PARALLEL)
def run_product(panels, affine, x, tokens, out, num_threads):
    """out[:tokens] `[., out_features]` = x Wᵀ + b; x and out float32."""
    counters = np.zeros(1, dtype=np.int64)
    for _ in prange(num_threads):
        _take_items(panels, affine, x, tokens, out, counters)


@njit(**FAST)
def _take_items(panels, affine, x, tokens, out, counters):
    """One thread's share."""
    tile = np.empty((ROWS, PANEL_COLUMNS), dtype=np.float32)
    items = len(panels) * -(-tokens // ROWS)
    item = fetch_add(counters, 0, 1)
    while item < items:
        multiply(item, panels, affine, x, tokens, tile, out, False)
        item = fetch_add(counters, 0, 1)


@njit(**FAST)
def multiply(item, panels, affine, x, tokens, tile, out, adds):
    """The item's panel of x Wᵀ + b for its rows, to `out` or added to it."""
    stay_apart()
    panel, chunk = divmod(item, _chunks(tokens))
    first, left, rows, columns = _extent(chunk, panel, tokens, out)
    _fill_tile(tile, panels[panel], x, first, rows)
    scale, bias = _columns_of(affine, panel)
    for row in range(rows):
        for column in range(columns):
            number = tile[row, column] * scale[column] + bias[column]
            if adds:
                number += out[first + row, left + column]
            out[first + row, left + column] = number


@njit(**FAST)
def multiply_gated(item, panels, affine, x, tokens, tiles, out):
    """The item's panel of silu(gate) * up for its rows."""
    stay_apart()
    pair, chunk = divmod(item, _chunks(tokens))
    first, left, rows, columns = _extent(chunk, pair, tokens, out)
    gate, up = tiles[0], tiles[1]
    _fill_tile(gate, panels[2 * pair], x, first, rows)
    _fill_tile(up, panels[2 * pair + 1], x, first, rows)
    gate_scale, gate_bias = _columns_of(affine, 2 * pair)
    up_scale, up_bias = _columns_of(affine, 2 * pair + 1)
    for row in range(rows):
        for column in range(columns):
            number = gate[row, column] * gate_scale[column] + gate_bias[column]
            factor = up[row, column] * up_scale[column] + up_bias[column]
            out[first + row, left + column] = number / (np.float32(1) + exp(-number)) * factor


@njit(**INLINED)
def _chunks(tokens):
    """Items of one panel; they follow each other, so that its weights come from memory once."""
    return np.int64(-(-tokens // ROWS))


@njit(**INLINED)
def _extent(chunk, panel, tokens, out):
    """First row and column of an item, and how many. Unsigned: of signed indices Numba looks
    whether they count from the end, which keeps LLVM from making vectors."""
    first, left = np.uint64(chunk * ROWS), np.uint64(panel * PANEL_COLUMNS)
    rows = min(np.uint64(ROWS), np.uint64(tokens) - first)
    return first, left, rows, min(np.uint64(PANEL_COLUMNS), np.uint64(out.shape[1]) - left)


@njit(**INLINED)
def _columns_of(affine, panel):
    """Scale and bias of its columns."""
    begin = panel * PANEL_COLUMNS
    return affine[0, begin : begin + PANEL_COLUMNS], affine[1, begin : begin + PANEL_COLUMNS]


@njit(**INLINED)
def _fill_tile(tile, weights, x, first, rows):
    """tile[:rows] = x[first : first + rows] Wᵀ for the columns of one panel, without scales."""
    for row in range(rows):
        for column in range(PANEL_COLUMNS):
            tile[row, column] = np.float32(0)
    for begin in range(0, len(weights), DEPTH):
        depth = min(DEPTH, len(weights) - begin)
        place = begin * PANEL_COLUMNS
        multiply_add(x, first, begin, weights, place, PANEL_COLUMNS, depth, tile, 0, 0, rows)
