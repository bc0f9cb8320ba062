"""Products with packed weights on the CPU: y = x Wᵀ + b, and silu(gate) * up of two of them.

W `[out_features, in_features]` is stored as panels `[panels, in_features, PANEL_COLUMNS]`: each
panel holds PANEL_COLUMNS columns of Wᵀ, so that a product reads it from its first number to its
last. Every column has a scale and a bias, `[2, panels * PANEL_COLUMNS]`; scales are 1 except for
int8 panels. Each sum runs over in_features in one order, so that a row's result does not depend on
what else is in the batch.

An item is one panel times up to ROWS rows. The columns that pad the last panel are computed and
dropped.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from .kernel import kernel
from .numbers import INLINED, exp
from .panels import PANEL_COLUMNS, PANEL_ROWS, multiply_add
from .region import launch

ROWS = 16 * PANEL_ROWS
"""Maximum rows per item: a panel's weights come from memory once for that many rows."""
DEPTH = 1024
"""Input features per pass: this slice of a panel stays in the second-level cache while every row
of the item reads it."""


class Product(NamedTuple):
    """A product, for each of a number of layers. x and out are float32 and may have more rows.

    For `multiply_gated`, panel 2i of a layer is the i-th of gate and panel 2i + 1 the i-th of up.
    """

    panels: Any
    """`[layers, panels, in_features, PANEL_COLUMNS]`."""
    affine: Any
    """Scales and biases `[layers, 2, panels * PANEL_COLUMNS]`."""
    x: Any
    """`[., in_features]`."""
    out: Any
    """`[., out_features]`."""
    tiles: Any
    """Scratch of `make_tiles`."""
    adds: bool
    """Whether the product is added to `out` (not by `multiply_gated`)."""


class GatedProduct(NamedTuple):
    """The work of `multiply_gated`: the fields of Product, without `adds`, and what LoRA adapters
    add to gate and up."""

    panels: Any
    affine: Any
    x: Any
    out: Any
    tiles: Any
    slots: Any
    """The adapter's slot of each row, −1 for none; empty if no row has an adapter."""
    deltas: Any
    """`[., 2 * out_features]`, read only for rows that have an adapter: gate's, then up's."""


def make_tiles(num_threads: int) -> np.ndarray[Any, Any]:
    """Return scratch for `num_threads` threads: two tiles of sums each."""
    return np.empty((num_threads, 2, ROWS, PANEL_COLUMNS), dtype=np.float32)


def count_items(panels: int, rows: int) -> int:
    """Return the number of items of a product. The items of one panel follow each other, so that
    its weights are read from memory once."""
    return panels * -(-rows // ROWS)


def run_product(
    panels: np.ndarray[Any, Any],
    affine: np.ndarray[Any, Any],
    x: np.ndarray[Any, Any],
    rows: int,
    out: np.ndarray[Any, Any],
    num_threads: int,
) -> None:
    """Compute out[:rows] `[., out_features]` = x Wᵀ + b of one layer; x and out are float32."""
    product = Product(panels[None], affine[None], x, out, make_tiles(num_threads), False)
    launch(multiply, product, count_items(len(panels), rows), rows, num_threads)


@kernel
def multiply(item, layer, rows, thread, product):
    """Compute an item of x Wᵀ + b into `out`, or add it to `out`."""
    panels, affine = product.panels[layer], product.affine[layer]
    out, tile, adds = product.out, product.tiles[thread, 0], product.adds
    panel, first, left, count, columns = _extent(item, rows, out)
    _fill_tile(tile, panels[panel], product.x, first, count)
    scale, bias = _columns_of(affine, panel)
    for row in range(count):
        for column in range(columns):
            number = tile[row, column] * scale[column] + bias[column]
            if adds:
                number += out[first + row, left + column]
            out[first + row, left + column] = number


@kernel
def multiply_gated(item, layer, rows, thread, product):
    """Compute an item of silu(gate) * up into `out`."""
    panels, affine = product.panels[layer], product.affine[layer]
    x, out, tiles = product.x, product.out, product.tiles[thread]
    pair, first, left, count, columns = _extent(item, rows, out)
    for half in range(2):
        _fill_tile(tiles[half], panels[2 * pair + half], x, first, count)
    gate, up = tiles[0], tiles[1]
    gate_scale, gate_bias = _columns_of(affine, 2 * pair)
    up_scale, up_bias = _columns_of(affine, 2 * pair + 1)
    for row in range(count):
        for column in range(columns):
            number = gate[row, column] * gate_scale[column] + gate_bias[column]
            factor = up[row, column] * up_scale[column] + up_bias[column]
            out[first + row, left + column] = number / (np.float32(1) + exp(-number)) * factor
    # Rows with an adapter are computed once more, with their deltas, so that the loop above is the
    # same for all others in every step. (A branch within it keeps LLVM from vectorising it.)
    slots, deltas, beside = product.slots, product.deltas, left + np.uint64(out.shape[1])
    for row in range(min(count, np.uint64(len(slots)))):
        if slots[first + row] >= 0:
            for column in range(columns):
                number = gate[row, column] * gate_scale[column] + gate_bias[column]
                number += deltas[first + row, left + column]
                factor = up[row, column] * up_scale[column] + up_bias[column]
                factor += deltas[first + row, beside + column]
                out[first + row, left + column] = number / (np.float32(1) + exp(-number)) * factor


@njit(**INLINED)
def _extent(item, rows, out):
    """Return an item's panel, its first row and column, and how many of each it has. All but the
    panel are unsigned: for a signed index Numba generates a test whether it counts from the end,
    which keeps LLVM from vectorising the loop."""
    panel, chunk = divmod(item, np.int64(-(-rows // ROWS)))
    first, left = np.uint64(chunk * ROWS), np.uint64(panel * PANEL_COLUMNS)
    count = min(np.uint64(ROWS), np.uint64(rows) - first)
    return panel, first, left, count, min(np.uint64(PANEL_COLUMNS), np.uint64(out.shape[1]) - left)


@njit(**INLINED)
def _columns_of(affine, panel):
    """Return scale and bias of a panel's columns."""
    begin = panel * PANEL_COLUMNS
    return affine[0, begin : begin + PANEL_COLUMNS], affine[1, begin : begin + PANEL_COLUMNS]


@njit(**INLINED)
def _fill_tile(tile, weights, x, first, count):
    """Compute tile[:count] = x[first : first + count] Wᵀ for the columns of one panel, without
    scale and bias."""
    for row in range(count):
        for column in range(PANEL_COLUMNS):
            tile[row, column] = np.float32(0)
    for begin in range(0, len(weights), DEPTH):
        depth = min(DEPTH, len(weights) - begin)
        place = begin * PANEL_COLUMNS
        multiply_add(x, first, begin, weights, place, PANEL_COLUMNS, depth, tile, 0, 0, count)
