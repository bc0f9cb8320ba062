"""Products in integers: y = x Wᵀ + b, and silu(gate) * up of two of them, with W in 4 or 8 bits.

x has been quantised (`quantise.py`). An item is one panel times up to ROWS rows, as of products in
floats.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ..kernel import kernel_in_chunks
from ..numbers import INLINED, exp
from ..panels import PANEL_COLUMNS
from ..products import (
    ITEMS_AT_ONCE,
    NO_DELTAS,
    NOBODY,
    WHOLE,
    Array,
    Call,
    Quantised,
    columns_of,
    extent_of,
)
from .fetch import Fetch, fetch
from .groups import add_groups
from .quantise import Quantise, quantise

DEPTH = 1024
"""Input features per pass: this slice of a panel stays in the first-level cache while every row of
the item reads it."""


class IntegerProduct(NamedTuple):
    """A product in integers. `out` is float32 and may have more rows.

    `data` holds the panels' records (`groups.py`) `[panels, groups, bytes]`: as uint8 if weights
    have 4 bits, as int8 if they have 8. Empty arrays stand for the kinds of scales and minimums:
    float32, int16 (float16's bits), int8 (integers times a unit), uint8 (all scales are 1, all
    minimums 0), and for minimums uint16 (-8 times the scale; they are in no record).
    """

    data: Any
    scales: Any
    minimums: Any
    units: Any
    """The units of scales, then of minimums, `[panels, ., 2 * PANEL_COLUMNS]`: float32 or
    float16's bits; empty if none has a unit."""
    factors: Any
    """A factor for each column, `[panels * PANEL_COLUMNS]`."""
    bias: Any
    """Like factors."""
    records: Any
    """x, as in Quantised."""
    group: int
    unit_groups: int
    """How many groups of a column share a unit; the last ones may be fewer. At least as many as
    DEPTH features are all of them or a divisor of DEPTH's."""
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

    data: Any
    scales: Any
    minimums: Any
    units: Any
    factors: Any
    bias: Any
    records: Any
    group: int
    unit_groups: int
    out: Any
    tiles: Any
    segments: Any
    slots: Any
    deltas: Any


class IntegerWeight(NamedTuple):
    """A PackedWeight of integers."""

    data: Any
    """This and the next five are as in IntegerProduct."""
    scales: Any
    minimums: Any
    units: Any
    factors: Any
    bias: Any
    group: int
    """Features per group."""
    unit_groups: int
    """As in IntegerProduct."""

    @property
    def num_panels(self) -> int:
        return len(self.data)

    @property
    def num_groups(self) -> int:
        return int(self.data.shape[1])

    @property
    def num_bytes(self) -> int:
        factors = 0 if self.scales.dtype != np.uint8 else self.factors.nbytes
        return int(self.data.nbytes + self.units.nbytes + factors)

    @property
    def depth(self) -> int:
        return self.num_groups * self.group

    def fetch(
        self, ids: Array, x: Array, scale: Any, norm: tuple[Array, Array], normed: Array
    ) -> Call:
        weight, epsilons = norm
        work = (*self[:4], self.factors, *self[6:], ids, x, scale, weight, epsilons, normed)
        return fetch, Fetch(*work)

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
        work = (*self[:6], *room, *self[6:], out, tiles, segments)
        return multiply_integers, IntegerProduct(*work, adds)

    def multiply_gated(
        self, x: Array, room: Quantised, out: Array, tiles: Array, segments: Array = WHOLE
    ) -> Call:
        work = (*self[:6], *room, *self[6:], out, tiles, segments)
        return multiply_gated_integers, IntegerGatedProduct(*work, NOBODY, NO_DELTAS)


def weight_like(quantization: str) -> IntegerWeight:
    """Return a weight of the types that int8 or int4 give: what kernels are compiled for."""
    columns, none = np.zeros(1, np.float32), np.zeros(0, np.uint8)
    if quantization == "int8":
        data, units = np.zeros((1, 1, 1), np.int8), np.zeros((0, 0, 0), np.float32)
        return IntegerWeight(data, none, none, units, columns, columns, 1, 1)
    data, steps = np.zeros((1, 1, 1), np.uint8), np.zeros(0, np.int8)
    units = np.zeros((1, 1, 1), np.int16)
    return IntegerWeight(data, steps, steps, units, columns, columns, 1, 1)


@kernel_in_chunks(ITEMS_AT_ONCE)
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


@kernel_in_chunks(ITEMS_AT_ONCE)
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
    weight = (product.data, product.scales, product.minimums, product.units)
    group, groups, unit_groups = product.group, np.int64(product.data.shape[1]), product.unit_groups
    for row in range(count):
        for column in range(PANEL_COLUMNS):
            tile[row, column] = np.float32(0)
    few = max(min(np.int64(DEPTH) // group, unit_groups), 1)
    for at in range(0, groups, few):
        begin, unit = panel * groups + at, panel * product.units.shape[1] + at // unit_groups
        first_x, some = np.int64(first) * groups + at, min(few, groups - at)
        add_groups(weight, begin, unit, product.records, first_x, groups, group, some, tile, count)
