"""Rows of an embedding that is packed as a weight of integers: a row of it is a column of a panel.

A tied head is multiplied by the same panels, so that the model holds one copy of both.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from ..kernel import kernel
from ..norms import FEW, copy_row, norm_row
from ..numbers import FAST_CALLS, load_scale, to_float
from ..panels import PANEL_COLUMNS
from .dots import ZERO_OF_BYTES


class Fetch(NamedTuple):
    """Rows of an embedding to be fetched, and normed."""

    data: Any
    """This and the next four are as in IntegerProduct."""
    scales: Any
    minimums: Any
    units: Any
    factors: Any
    group: int
    unit_groups: int
    ids: Any
    """Which rows, `[.]`."""
    x: Any
    """The rows, times `scale` (out): `[., in_features]` float32."""
    scale: Any
    """float32."""
    weight: Any
    """Of an RMSNorm, `[layers, in_features]` float32; the first is used. Empty if rows are not
    normed."""
    epsilons: Any
    """`[layers]` float32, negative for a layer whose input is copied."""
    normed: Any
    """Like x (out)."""


@kernel
def fetch(item, layer, rows, thread, work):
    """Fetch an item's rows, and norm them."""
    data, scales, minimums, units = work.data, work.scales, work.minimums, work.units
    factors, group, unit_groups = work.factors, work.group, work.unit_groups
    ids, x, scale, normed, weight = work.ids, work.x, work.scale, work.normed, work.weight
    for row in range(item * FEW, min(item * FEW + FEW, rows)):
        panel, column = divmod(ids[row], np.int64(PANEL_COLUMNS))
        factor = factors[ids[row]] * scale
        for at in range(data.shape[1]):
            record, unit = data[panel, at], at // unit_groups
            # 1. The scale and the minimum of this column.
            place = PANEL_COLUMNS * _width(scales)
            step = _number(record, scales, 0, units, panel, unit, column, 0)
            least = _number(record, minimums, place, units, panel, unit, column, PANEL_COLUMNS)
            step = step if _width(scales) > 0 else np.float32(1)
            if _is_centred(minimums):
                least = np.float32(-8) * step
            # 2. Its integers.
            place += PANEL_COLUMNS * _width(minimums) + 4 * column
            line = x[row, at * group : (at + 1) * group]  # of the last group, what x has of it
            _fill(record, place, step * factor, least * factor, line)
        if len(weight) > 0 and work.epsilons[0] >= 0:
            norm_row(x[row], weight[0], work.epsilons[0], normed[row])
        elif len(weight) > 0:
            copy_row(x[row], normed[row])


def _width(kind):
    """Return the bytes of a scale or minimum of a kind in a record."""


@overload(_width, jit_options=FAST_CALLS)
def _width_of(kind):
    width = {types.float32: 4, types.int16: 2, types.int8: 1}.get(kind.dtype, 0)
    return lambda kind: width


def _is_centred(kind):
    """Return whether minimums are -8 times the scale."""


@overload(_is_centred, jit_options=FAST_CALLS)
def _is_centred_kind(kind):
    answer = kind.dtype == types.uint16
    return lambda kind: answer


def _number(record, kind, begin, units, panel, unit, column, of_unit):
    """Return the scale or minimum of a column, of those that begin at a byte of a record; 0 if
    there is none."""


@overload(_number, jit_options=FAST_CALLS)
def _number_of(record, kind, begin, units, panel, unit, column, of_unit):
    if kind.dtype == types.int8:

        def read(record, kind, begin, units, panel, unit, column, of_unit):
            number = np.float32(np.int8(record[begin + column]))
            return number * to_float(units[panel, unit, of_unit + column])

    elif kind.dtype == types.int16:

        def read(record, kind, begin, units, panel, unit, column, of_unit):
            low, high = record[begin + 2 * column], record[begin + 2 * column + 1]
            return to_float(np.int16(np.uint16(np.uint8(low)) | np.uint16(np.uint8(high)) << 8))

    elif kind.dtype == types.float32:

        def read(record, kind, begin, units, panel, unit, column, of_unit):
            return load_scale(record, begin + 4 * column)

    else:

        def read(record, kind, begin, units, panel, unit, column, of_unit):
            return np.float32(0)

    return read


def _fill(record, place, step, least, line):
    """Write a column's weights of a group; its first four integers are at `place`."""


@overload(_fill, jit_options=FAST_CALLS)
def _fill_of(record, place, step, least, line):
    if record.dtype == types.uint8:

        def fill(record, place, step, least, line):
            for feature in range(len(line)):
                four, byte = divmod(feature, 4)
                octet = record[place + four // 2 * 4 * PANEL_COLUMNS + byte]
                integer = octet >> 4 if four % 2 else octet & 15
                line[feature] = np.float32(integer) * step + least

    else:

        def fill(record, place, step, least, line):
            for feature in range(len(line)):
                four, byte = divmod(feature, 4)
                octet = record[place + four * 4 * PANEL_COLUMNS + byte]
                line[feature] = np.float32(np.int8(octet ^ np.int8(-ZERO_OF_BYTES))) * step + least

    return fill
