"""Panels of products in integers, group by group, whose sums stay in vector registers.

W and x are cut into groups of features; each group of a row has a scale, and W's perhaps a minimum:

    W[o, k] = scale[o, g] · (q[o, k] - zero) + minimum[o, g]        x[r, k] ≈ step[r, g] · n[r, k]

    y[r, o] = Σ_g  step[r, g] · scale[o, g] · Σ_k (q[o, k] - zero) · n[r, k]
                 + minimum[o, g] · step[r, g] · Σ_k n[r, k]

The sum over k is of integers, exact in any order, and the sum over g runs in one order: a row's
result does not depend on the batch, nor on how the processor multiplies bytes (`dots.py`).

W and x are each one stream of records, a record for each group:

    of a panel   scale of each of PANEL_COLUMNS columns | minimum of each | q of all of them
    of a row     step, step · Σ n (float32), -128 · Σ n (int32), 4 bytes unused | n of each feature

so that a product reads memory from one place on, and a row's addresses are those of its record. A
vector of q is four features of LANES columns in bytes, or eight in halves of bytes: the first four
features in the low halves. Scales and minimums are float32, float16, or integers of 8 bits that are
multiplied by a unit, of which a column has one for some of its groups.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..numbers import CACHE_LINE, INLINED, LANES
from ..panels import PANEL_COLUMNS, PANEL_ROWS, PANEL_VECTORS, for_row_counts
from ..products import HEAD_BYTES
from ..vectors import (
    FLOATS,
    INDEX,
    WORDS,
    arrays_of,
    broadcast,
    fused,
    index,
    place_of,
    plus,
    pointer_to,
    prefetch,
    to_floats,
    words,
)
from .dots import BYTES, begins_at_offset, dot

UNIT = 16
"""A group's size is a multiple of this many features."""
_AHEAD = 256
"""How many bytes ahead x is fetched."""
_WEIGHTS_AHEAD = 6144
"""How many bytes ahead weights are fetched."""
_MANY = 5
"""From how many products for each byte of weights on that is done."""
_VECTOR_BYTES = 4 * LANES
_BYTE, _INT32, _FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()
_WIDTHS = {types.float32: 4, types.int16: 2, types.int8: 1, types.uint8: 0, types.uint16: 0}
"""Bytes of a scale or minimum in a record, by the type that stands for its kind: see
`products.IntegerProduct`."""


@njit(**INLINED)
def add_groups(weight, begin, unit, x, first, stride, group, groups, out, rows):
    """Compute out[:rows, :PANEL_COLUMNS] += the products of `groups` groups.

    `weight` is (data, scales, minimums, units), `begin` counts its records before these groups, and
    `unit` its rows of units before theirs. `first` counts the records of x before them, of which a
    row has `stride`. For the arrays see `products.IntegerProduct`.
    """
    for at in range(0, np.int64(rows), PANEL_ROWS):
        few = min(np.int64(rows) - at, PANEL_ROWS)
        begin_x = first + at * stride
        _add_groups(*weight, begin, unit, x, begin_x, stride, group, groups, out, at, few)


@intrinsic
def _add_groups(
    typing_context,
    data,
    scales,
    minimums,
    units,
    begin,
    unit,
    x,
    first,
    stride,
    group,
    groups,
    out,
    row,
    rows,
):
    """Do what `add_groups` does, for at most PANEL_ROWS rows of `out` from `row` on."""

    def generate(context, builder, signature, arguments):
        arrays = arrays_of(context, builder, signature, arguments, (0, 3, 6, 11))
        form = _Form(*(each.dtype for each in signature.args[:4]))
        begin, unit, _, first, stride, group, groups, _, row, rows = arguments[4:]
        given = (begin, unit, first, stride, group, groups, row)
        counts = range(1, PANEL_ROWS + 1)
        for_row_counts(
            builder, rows, counts, lambda count: _add_rows(builder, form, count, arrays, given)
        )
        return context.get_dummy_value()

    integer = types.int64
    kinds = (data, scales, minimums, units, integer, integer, x, *[integer] * 4, out)
    return types.void(*kinds, integer, integer), generate


class _Form:
    """How a panel's records are written."""

    def __init__(self, data, scales, minimums, units):
        self.scales, self.minimums, self.units = scales, minimums, units
        self.bits = 4 if data == types.uint8 else 8
        self.at_minimums = PANEL_COLUMNS * _WIDTHS[scales]
        self.at_quants = self.at_minimums + PANEL_COLUMNS * _WIDTHS[minimums]
        self.bytes_of_feature = PANEL_COLUMNS * self.bits // 8


def _add_rows(builder, form, count, arrays, given):
    """Generate the code for `count` rows."""
    data, units, x, out = arrays
    begin, unit, first, stride, group, groups, row = given
    panel = [(at, part) for at in range(count) for part in range(PANEL_VECTORS)]
    # 1. The float sums start from what is in `out`, and end there. Each has a stack slot, which
    #    LLVM turns into a register, since nothing takes its address.
    targets = []
    for at, part in panel:
        place = place_of(builder, out, plus(builder, row, at), index(LANES * part))
        targets.append(pointer_to(builder, out, place))
    totals = [cgutils.alloca_once(builder, FLOATS) for _ in panel]
    integers = [cgutils.alloca_once(builder, WORDS) for _ in panel]
    for target, total in zip(targets, totals, strict=True):
        builder.store(builder.load(target, align=4), total)
    # 2. Where the records of the panel and of each row begin, and the panel's row of units.
    record = plus(builder, builder.mul(group, index(form.bytes_of_feature)), form.at_quants)
    x_record = plus(builder, group, HEAD_BYTES)
    octets = builder.gep(_bytes(builder, data.data), [builder.mul(begin, record)])
    lines = []
    for at in range(count):
        before = builder.add(first, builder.mul(stride, index(at)))
        lines.append(builder.gep(_bytes(builder, x.data), [builder.mul(before, x_record)]))
    unit_row = builder.gep(units.data, [builder.mul(unit, index(2 * PANEL_COLUMNS))])
    with cgutils.for_range(builder, groups, intp=INDEX) as loop:
        weights = builder.gep(octets, [builder.mul(loop.index, record)])
        before = builder.mul(loop.index, x_record)
        heads = [builder.gep(line, [before]) for line in lines]
        if form.bits == 4:
            # The panel's stream pushes x out of the first-level cache: fetch it back in time.
            for head in heads:
                prefetch(builder, builder.gep(head, [index(_AHEAD)]))
        _fetch_weights(builder, form, count, weights, form.at_quants)
        # 3. The integer sums of a group, times its scales, to the float sums.
        for which, (at, _) in enumerate(panel):
            builder.store(_beginning(builder, form, heads[at]), integers[which])
        _add_integers(builder, form, weights, heads, group, integers)
        for part in range(PANEL_VECTORS):
            columns = _columns(builder, form, weights, unit_row, part)
            for at, head in enumerate(heads):
                which = at * PANEL_VECTORS + part
                _add_scaled(builder, columns, head, integers[which], totals[which])
    for target, total in zip(targets, totals, strict=True):
        builder.store(builder.load(total), target, align=4)


def _fetch_weights(builder, form, count, weights, size):
    """Fetch `size` bytes of weights that will be read later, if there are many rows: then a
    record's instructions fill the processor's window, so that it does not look ahead. With few
    rows it does so itself, and faster."""
    for at in range(0, size if 8 * count >= _MANY * form.bits else 0, CACHE_LINE):
        prefetch(builder, builder.gep(weights, [index(_WEIGHTS_AHEAD + at)]), level=2)


def _add_integers(builder, form, weights, heads, group, integers):
    """Add the products of a group's integers to their sums."""
    with cgutils.for_range(builder, builder.udiv(group, index(UNIT)), intp=INDEX) as unit:
        features = builder.mul(unit.index, index(UNIT))
        place = builder.mul(features, index(form.bytes_of_feature))
        numbers = plus(builder, features, HEAD_BYTES)
        octets = builder.gep(weights, [plus(builder, place, form.at_quants)])
        _fetch_weights(builder, form, len(heads), octets, UNIT * form.bytes_of_feature)
        _add_unit(
            builder,
            octets,
            [builder.gep(head, [numbers]) for head in heads],
            integers,
            form.bits,
        )


def _add_scaled(builder, columns, head, integer, total):
    """Add a vector's sum of integers, times step and scale, to its float sum, and the minimum times
    the sum of the row's numbers."""
    scale, least = columns
    exact = builder.sitofp(builder.load(integer), FLOATS)
    step, added = _header(builder, head, 0, _FLOAT), builder.load(total)
    if scale is None:
        added = fused(builder, exact, step, added)
    else:
        added = fused(builder, builder.fmul(exact, step), scale, added)
    if least is not None:
        added = fused(builder, _header(builder, head, 4, _FLOAT), least, added)
    builder.store(added, total)


def _beginning(builder, form, head):
    """Return where a sum of integers begins: zero, or what makes up for stored integers that are
    too great by 128, or by 8 if the minimums are -8 times the scale."""
    is_centred = form.minimums == types.uint16
    if not (begins_at_offset(form.bits) or is_centred):
        return words(0)
    offset = _header(builder, head, 8, _INT32)
    return builder.ashr(offset, words(4)) if is_centred else offset


def _header(builder, head, place, kind):
    """Return a number of a row's record in all lanes."""
    pointer = builder.bitcast(builder.gep(head, [index(place)]), kind.as_pointer())
    return broadcast(builder, builder.load(pointer, align=4))


def _columns(builder, form, weights, unit_row, part):
    """Return a vector of a group's scales and one of its minimums; None if there are none."""
    kinds = ((form.scales, 0, 0), (form.minimums, form.at_minimums, PANEL_COLUMNS))
    found: list[ir.Value | None] = []
    for kind, begin, begin_units in kinds:
        width = _WIDTHS[kind]
        if not width:
            found.append(None)
            continue
        numbers = _vector(builder, weights, begin + LANES * part * width, 8 * width, kind)
        if kind == types.int8:
            pointer = builder.gep(unit_row, [index(begin_units + LANES * part)])
            bits = 32 if form.units == types.float32 else 16
            unit = _vector(builder, _bytes(builder, pointer), 0, bits, form.units)
            numbers = builder.fmul(numbers, unit)
        found.append(numbers)
    return found


def _vector(builder, pointer, place, bits, number_type):
    """Load LANES numbers of so many bits as float32."""
    element = _FLOAT if bits == 32 else ir.IntType(bits)
    at = builder.gep(pointer, [index(place)])
    at = builder.bitcast(at, ir.VectorType(element, LANES).as_pointer())
    return to_floats(builder, number_type, builder.load(at, align=1))


def _add_unit(builder, octets, numbers, integers, bits):
    """Add the products of UNIT features to the integer sums."""
    features = 32 // bits  # of one vector
    for vector in range(UNIT // features):
        # 1. The weights: of 8 bits one set of four features, of 4 bits two.
        sets = []
        for part in range(PANEL_VECTORS):
            at = index((vector * PANEL_VECTORS + part) * _VECTOR_BYTES)
            pointer = builder.bitcast(builder.gep(octets, [at]), BYTES.as_pointer())
            sets.append(_unpacked(builder, builder.load(pointer, align=1), bits))
        # 2. For each row four numbers, in all lanes, times those.
        for four in range(features // 4):
            for row, first in enumerate(numbers):
                at = index(vector * features + 4 * four)
                pointer = builder.bitcast(builder.gep(first, [at]), _INT32.as_pointer())
                all_lanes = broadcast(builder, builder.load(pointer, align=1))
                four_numbers = builder.bitcast(all_lanes, BYTES)
                for part in range(PANEL_VECTORS):
                    integer = integers[row * PANEL_VECTORS + part]
                    total = builder.load(integer)
                    total = dot(builder, total, sets[part][four], four_numbers, bits)
                    builder.store(total, integer)


def _unpacked(builder, loaded, bits):
    """Return a vector's sets of four features: its bytes, or their low and their high halves."""
    if bits == 8:
        return [loaded]
    low = ir.Constant(WORDS, [0x0F0F0F0F] * LANES)
    both = builder.bitcast(loaded, WORDS)
    high = builder.lshr(both, words(4))
    return [builder.bitcast(builder.and_(half, low), BYTES) for half in (both, high)]


def _bytes(builder, pointer):
    return builder.bitcast(pointer, _BYTE.as_pointer())
