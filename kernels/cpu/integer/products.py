"""Products in integers: y = x Wᵀ + b, and silu(gate) * up of two of them, with W in 4 or 8 bits.

x has been quantised (`quantise.py`). An item is one panel times up to ROWS rows, as of products in
floats.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ..kernel import kernel
from ..numbers import INLINED, exp
from ..panels import PANEL_COLUMNS
from ..products import NO_DELTAS, NOBODY, WHOLE, Array, Call, Quantised, columns_of, extent_of
from .groups import add_groups
from .quantise import Quantise, quantise

DEPTH = 1024
"""Input features per pass: this slice of a panel stays in the first-level cache while every row of
the item reads it."""


class IntegerProduct(NamedTuple):
    """A product in integers. `out` is float32 and may have more rows."""

    quants: Any
    """Weights: uint8 `[panels, groups, group / 8, PANEL_VECTORS, 4 * LANES]` of 4 bits, int8
    `[panels, groups, group / 4, …]` of 8 bits."""
    scales: Any
    """`[panels, groups, PANEL_COLUMNS]`, float32 or float16's bits; empty uint8 if all are 1."""
    minimums: Any
    """Like scales. Empty uint8 if all are 0, empty int8 if all are -8 times the scale."""
    factors: Any
    """A factor for each column, `[panels * PANEL_COLUMNS]`."""
    bias: Any
    """Like factors."""
    numbers: Any
    """x. This and the next three are as in Quantised."""
    steps: Any
    sums: Any
    offsets: Any
    group: int
    out: Any
    """`[., out_features]`."""
    tiles: Any
    """Scratch of `products.make_tiles`."""
    segments: Any
    """As in `products.Product`."""
    adds: bool
    """Whether the product is added to `out`."""


class IntegerGatedProduct(NamedTuple):
    """The work of `multiply_gated_integers`: the fields of IntegerProduct without `adds`, and those
    of `products.Gated`. Panel 2i is the i-th of gate and panel 2i + 1 the i-th of up."""

    quants: Any
    scales: Any
    minimums: Any
    factors: Any
    bias: Any
    numbers: Any
    steps: Any
    sums: Any
    offsets: Any
    group: int
    out: Any
    tiles: Any
    segments: Any
    slots: Any
    deltas: Any


class IntegerWeight(NamedTuple):
    """A PackedWeight of integers."""

    quants: Any
    """This and the next four are as in IntegerProduct."""
    scales: Any
    minimums: Any
    factors: Any
    bias: Any
    group: int
    """Features per group."""

    @property
    def num_panels(self) -> int:
        return len(self.quants)

    @property
    def num_groups(self) -> int:
        return int(self.quants.shape[1])

    @property
    def depth(self) -> int:
        return self.num_groups * self.group

    def quantise(self, x: Array, room: Quantised, tiles: Array) -> Call | None:
        return quantise, Quantise(x, *room, self.group, self.num_groups, tiles)

    def multiply(
        self,
        x: Array,
        room: Quantised,
        out: Array,
        tiles: Array,
        adds: bool,
        segments: Array = WHOLE,
    ) -> Call:
        work = (*self[:5], *room, self.group, out, tiles, segments)
        return multiply_integers, IntegerProduct(*work, adds)

    def multiply_gated(
        self, x: Array, room: Quantised, out: Array, tiles: Array, segments: Array = WHOLE
    ) -> Call:
        work = (*self[:5], *room, self.group, out, tiles, segments)
        return multiply_gated_integers, IntegerGatedProduct(*work, NOBODY, NO_DELTAS)


def weight_like(quantization: str) -> IntegerWeight:
    """Return a weight of the types that int8 or int4 give: what kernels are compiled for."""
    columns, none = np.zeros(1, np.float32), np.zeros((0, 0, 0), np.uint8)
    if quantization == "int8":
        return IntegerWeight(np.zeros((1, 1, 1), np.int8), none, none, columns, columns, 1)
    halves = np.zeros((1, 1, 1), np.int16)
    return IntegerWeight(np.zeros((1, 1, 1), np.uint8), halves, halves, columns, columns, 1)


@kernel
def multiply_integers(item, layer, rows, thread, product):
    """Compute an item of x Wᵀ + b into `out`, or add it to `out`."""
    out, tile, adds = product.out, product.tiles[thread, 0], product.adds
    panel, first, left, count, columns = extent_of(item, rows, out, product.segments)
    _fill_tile(tile, product, panel, first, count)
    scale, bias = columns_of(product.factors, panel), columns_of(product.bias, panel)
    for row in range(count):
        for column in range(columns):
            number = tile[row, column] * scale[column] + bias[column]
            if adds:
                number += out[first + row, left + column]
            out[first + row, left + column] = number


@kernel
def multiply_gated_integers(item, layer, rows, thread, product):
    """Compute an item of silu(gate) * up into `out`."""
    out, tiles, factors, biases = product.out, product.tiles[thread], product.factors, product.bias
    pair, first, left, count, columns = extent_of(item, rows, out, product.segments)
    for half in range(2):
        _fill_tile(tiles[half], product, 2 * pair + half, first, count)
    gate, up = tiles[0], tiles[1]
    gate_scale, gate_bias = columns_of(factors, 2 * pair), columns_of(biases, 2 * pair)
    up_scale, up_bias = columns_of(factors, 2 * pair + 1), columns_of(biases, 2 * pair + 1)
    for row in range(count):
        for column in range(columns):
            number = gate[row, column] * gate_scale[column] + gate_bias[column]
            factor = up[row, column] * up_scale[column] + up_bias[column]
            out[first + row, left + column] = number / (np.float32(1) + exp(-number)) * factor
    # Rows with an adapter once more, in a loop of its own: see `products.multiply_gated`.
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
def _fill_tile(tile, product, panel, first, count):
    """Compute tile[:count] = x[first : first + count] Wᵀ for the columns of one panel, without
    factor and bias."""
    weight = (product.quants, product.scales, product.minimums)
    x = (product.numbers, product.steps, product.sums, product.offsets)
    group, groups = product.group, np.int64(product.quants.shape[1])
    for row in range(count):
        for column in range(PANEL_COLUMNS):
            tile[row, column] = np.float32(0)
    few = max(np.int64(DEPTH) // group, 1)
    for begin in range(0, groups, few):
        of_weight, of_x = panel * groups + begin, np.int64(first) * groups + begin
        some = min(few, groups - begin)
        add_groups(weight, of_weight, x, of_x, groups, group, some, tile, count)
