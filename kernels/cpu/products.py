"""Products with packed weights on the CPU: y = x Wᵀ + b, and silu(gate) * up of two of them.

W `[out_features, in_features]` is stored as panels `[panels, in_features, PANEL_COLUMNS]`: each
panel holds PANEL_COLUMNS columns of Wᵀ, so that a product reads it from its first number to its
last. Every column has a bias, `[panels * PANEL_COLUMNS]`. Each sum runs over in_features in one
order, so that a row's result does not depend on what else is in the batch.

Weights of 4 and 8 bits are multiplied in integers, by kernels of their own: see `integer`. What the
two have in common is `PackedWeight`.

An item is one panel times up to ROWS rows. The columns that pad the last panel are computed and
dropped.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numba import njit

from .kernel import Kernel, Work, kernel, kernel_in_chunks
from .numbers import INLINED, exp
from .panels import PANEL_COLUMNS, PANEL_ROWS, multiply_add
from .region import run_calls

ROWS = 16 * PANEL_ROWS
"""Maximum rows per item: a panel's weights come from memory once for that many rows."""
ITEMS_AT_ONCE = 8
"""Maximum items that a thread takes at once: the processor fetches ahead what follows an item's
weights, in vain if another thread takes the next item."""
QUANTISED_ROWS = 4
"""Rows per item when x is quantised."""
HEAD_BYTES = 16
"""Bytes of a quantised row's record before its numbers: step, sum and offset."""
DEPTH = 1024
"""Input features per pass: this slice of a panel stays in the second-level cache while every row
of the item reads it."""


Array = np.ndarray[Any, Any]
Call = tuple[Kernel, Work]
WHOLE: Array = np.empty((0, 4), np.int64)
"""The segments of a product of all rows with all panels."""
NOBODY: Array = np.empty(0, np.int64)
NO_DELTAS: Array = np.empty((0, 1), np.float32)
"""The slots and deltas of a product without LoRA adapters."""


class Quantised(NamedTuple):
    """Room for rows of x in integers: the rows of one product follow each other, whatever their
    length, so that products of any depth can use it."""

    records: Any
    """A record for each group of each row, uint8 `[.]`: see `integer.groups`."""


class PackedWeight(Protocol):
    """A weight in panels, with its bias: the weights of one product."""

    @property
    def num_panels(self) -> int:
        """Return the number of panels."""

    @property
    def num_groups(self) -> int:
        """Return the number of groups of features that rows of x are quantised in; 0 if they are
        not."""

    @property
    def depth(self) -> int:
        """Return the number of features of a quantised row."""

    @property
    def num_bytes(self) -> int:
        """Return the bytes of memory that it takes, without the bias."""

    def quantise(self, x: Array, room: Quantised, tiles: Array) -> Call | None:
        """Return the kernel that brings rows of x into `room`, in the form that `multiply` reads,
        and its work; None if it reads x itself."""

    def multiply(
        self,
        x: Array,
        room: Quantised,
        out: Array,
        tiles: Array,
        adds: bool,
        segments: Array = WHOLE,
    ) -> Call:
        """Return the kernel that computes x Wᵀ + b into `out`, or adds it to `out`."""

    def multiply_gated(
        self, x: Array, room: Quantised, out: Array, tiles: Array, segments: Array = WHOLE
    ) -> Call:
        """Return the kernel that computes silu(gate) * up into `out`. Panel 2i is the i-th of
        gate, panel 2i + 1 the i-th of up."""


class PackedEmbedding(Protocol):
    """A weight whose rows are an embedding's: the columns of its panels."""

    def fetch(
        self, ids: Array, x: Array, scale: Any, norm: tuple[Array, Array], normed: Array
    ) -> Call:
        """Return the kernel that writes rows `ids` times `scale` to x `[., in_features]`, and
        their RMSNorm to `normed`, like x. `norm` is a weight `[layers, in_features]` and epsilons
        `[layers]`, of which the first counts, or an empty weight: nothing is normed. An item is
        FEW rows (`norms.py`)."""


class Product(NamedTuple):
    """A product. x and out are float32 and may have more rows."""

    panels: Any
    """`[panels, in_features, PANEL_COLUMNS]`."""
    bias: Any
    """`[panels * PANEL_COLUMNS]` float32."""
    x: Any
    """`[., in_features]`."""
    out: Any
    """`[., out_features]`."""
    tiles: Any
    """Scratch of `make_tiles`."""
    segments: Any
    """Empty if all rows are multiplied by all panels. Else a row for each run of rows that has
    panels of its own, as `make_segments` returns them."""
    adds: bool
    """Whether the product is added to `out`."""


class Gated(Protocol):
    """The work of a kernel that computes silu(gate) * up, and what LoRA adapters add to the two:
    a named tuple."""

    slots: Any
    """The adapter's slot of each row, −1 for none; empty if no row has an adapter."""
    deltas: Any
    """`[., 2 * out_features]`, read only for rows that have an adapter: gate's, then up's."""

    def _replace(self, *, slots: Array, deltas: Array) -> Work: ...


class GatedProduct(NamedTuple):
    """The work of `multiply_gated`: the fields of Product without `adds`, and those of Gated. Panel
    2i is the i-th of gate and panel 2i + 1 the i-th of up."""

    panels: Any
    bias: Any
    x: Any
    out: Any
    tiles: Any
    segments: Any
    slots: Any
    deltas: Any


class FloatWeight(NamedTuple):
    """A PackedWeight of floats."""

    panels: Any
    """This and the next are as in Product."""
    bias: Any

    @property
    def num_panels(self) -> int:
        return len(self.panels)

    @property
    def num_groups(self) -> int:
        return 0

    @property
    def depth(self) -> int:
        return 0

    @property
    def num_bytes(self) -> int:
        return int(self.panels.nbytes)

    def quantise(self, x: Array, room: Quantised, tiles: Array) -> Call | None:
        return None

    def multiply(
        self,
        x: Array,
        room: Quantised,
        out: Array,
        tiles: Array,
        adds: bool,
        segments: Array = WHOLE,
    ) -> Call:
        return multiply, Product(*self, x, out, tiles, segments, adds)

    def multiply_gated(
        self, x: Array, room: Quantised, out: Array, tiles: Array, segments: Array = WHOLE
    ) -> Call:
        return multiply_gated, GatedProduct(*self, x, out, tiles, segments, NOBODY, NO_DELTAS)


def make_tiles(num_threads: int) -> Array:
    """Return scratch for `num_threads` threads: two tiles of sums each."""
    return np.empty((num_threads, 2, ROWS, PANEL_COLUMNS), dtype=np.float32)


def make_quantised(rows: int, features: int, groups: int) -> Quantised:
    """Return room for so many rows of at most so many features and groups."""
    return Quantised(np.zeros(rows * (features + HEAD_BYTES * groups), np.uint8))


def count_items(panels: int, rows: int) -> int:
    """Return the number of items of a product. The items of one panel follow each other, so that
    its weights are read from memory once."""
    return panels * -(-rows // ROWS)


def make_segments(experts: Array, counts: Array, panels: int) -> tuple[Array, int]:
    """Return segments for products with stacked weights of `panels` panels (or pairs of them) each,
    of which each has some of the rows, and the number of items: `experts` are those that have any,
    `counts` how many rows, which follow each other.

    A segment is (its first item, its first panel, its first row, its rows).
    """
    items = panels * -(-counts // ROWS)
    firsts = np.cumsum(items) - items
    rows = np.cumsum(counts) - counts
    return np.stack((firsts, experts * panels, rows, counts), axis=1), int(items.sum())


def count_few(rows: int) -> int:
    """Return the number of items of `PackedWeight.quantise`."""
    return -(-rows // QUANTISED_ROWS)


def run_product(weight: PackedWeight, x: Array, rows: int, out: Array, num_threads: int) -> None:
    """Compute out[:rows] `[., out_features]` = x Wᵀ + b; x and out are float32."""
    room, tiles = make_quantised(rows, weight.depth, weight.num_groups), make_tiles(num_threads)
    calls = [(weight.multiply(x, room, out, tiles, False), count_items(weight.num_panels, rows))]
    quantise = weight.quantise(x, room, tiles)
    if quantise is not None:
        calls.insert(0, (quantise, count_few(rows)))
    run_calls(calls, rows, num_threads)


@kernel_in_chunks(ITEMS_AT_ONCE)
def multiply(item, layer, rows, thread, product):
    """Compute an item of x Wᵀ + b into `out`, or add it to `out`."""
    out, tile, adds = product.out, product.tiles[thread, 0], product.adds
    panel, first, left, count, columns = extent_of(item, rows, out, product.segments)
    _fill_tile(tile, product.panels[panel], product.x, first, count)
    bias = columns_of(product.bias, panel)
    for row in range(count):
        for column in range(columns):
            number = tile[row, column] + bias[column]
            if adds:
                number += out[first + row, left + column]
            out[first + row, left + column] = number


@kernel_in_chunks(ITEMS_AT_ONCE)
def multiply_gated(item, layer, rows, thread, product):
    """Compute an item of silu(gate) * up into `out`."""
    x, out, tiles = product.x, product.out, product.tiles[thread]
    pair, first, left, count, columns = extent_of(item, rows, out, product.segments)
    for half in range(2):
        _fill_tile(tiles[half], product.panels[2 * pair + half], x, first, count)
    gate, up = tiles[0], tiles[1]
    gate_bias = columns_of(product.bias, 2 * pair)
    up_bias = columns_of(product.bias, 2 * pair + 1)
    for row in range(count):
        for column in range(columns):
            number = gate[row, column] + gate_bias[column]
            factor = up[row, column] + up_bias[column]
            out[first + row, left + column] = number / (np.float32(1) + exp(-number)) * factor
    # Rows with an adapter are computed once more, with their deltas, so that the loop above is the
    # same for all others in every step. (A branch within it keeps LLVM from vectorising it.)
    slots, deltas, beside = product.slots, product.deltas, left + np.uint64(out.shape[1])
    for row in range(min(count, np.uint64(len(slots)))):
        if slots[first + row] >= 0:
            for column in range(columns):
                number = gate[row, column] + gate_bias[column]
                number += deltas[first + row, left + column]
                factor = up[row, column] + up_bias[column]
                factor += deltas[first + row, beside + column]
                out[first + row, left + column] = number / (np.float32(1) + exp(-number)) * factor


@njit(**INLINED)
def extent_of(item, rows, out, segments):
    """Return an item's panel, its first row and column, and how many of each it has. All but the
    panel are unsigned: for a signed index Numba generates a test whether it counts from the end,
    which keeps LLVM from vectorising the loop."""
    first_panel, first_row = np.int64(0), np.int64(0)
    if len(segments) > 0:
        segment = len(segments) - 1
        while segments[segment, 0] > item:
            segment -= 1
        item -= segments[segment, 0]
        first_panel, first_row, rows = (
            segments[segment, 1],
            segments[segment, 2],
            segments[segment, 3],
        )
    panel, chunk = divmod(item, np.int64(-(-rows // ROWS)))
    left, below = np.uint64(panel * PANEL_COLUMNS), np.uint64(chunk * ROWS)
    count = min(np.uint64(ROWS), np.uint64(rows) - below)
    columns = min(np.uint64(PANEL_COLUMNS), np.uint64(out.shape[1]) - left)
    return first_panel + panel, np.uint64(first_row) + below, left, count, columns


class Blend(NamedTuple):
    """Rows to be summed up with weights."""

    rows: Any
    """`[., n]` float32."""
    places: Any
    """Which rows make a row of `out`, `[., k]`."""
    weights: Any
    """`[., k]` float32."""
    out: Any
    """`[., n]` float32."""


@kernel
def blend(item, layer, rows, thread, work):
    """Compute row `item` of out: the sum of its rows times their weights, in their order."""
    out, places, weights = work.out[item], work.places[item], work.weights[item]
    for dim in range(len(out)):
        out[dim] = np.float32(0)
    for each in range(len(places)):
        source, weight = work.rows[places[each]], weights[each]
        for dim in range(len(out)):
            out[dim] += weight * source[dim]


@njit(**INLINED)
def columns_of(numbers, panel):
    """Return the numbers of a panel's columns."""
    begin = panel * PANEL_COLUMNS
    return numbers[begin : begin + PANEL_COLUMNS]


@njit(**INLINED)
def _fill_tile(tile, weights, x, first, count):
    """Compute tile[:count] = x[first : first + count] Wᵀ for the columns of one panel, without
    bias."""
    for row in range(count):
        for column in range(PANEL_COLUMNS):
            tile[row, column] = np.float32(0)
    for begin in range(0, len(weights), DEPTH):
        depth = min(DEPTH, len(weights) - begin)
        place = begin * PANEL_COLUMNS
        multiply_add(x, first, begin, weights, place, PANEL_COLUMNS, depth, tile, 0, 0, count)
