"""Panels of products in integers, group by group, whose sums stay in vector registers.

W and x are cut into groups of features; each group of a row has a scale, and W's perhaps a minimum:

    W[o, k] = scale[o, g] · (q[o, k] - zero) + minimum[o, g]        x[r, k] ≈ step[r, g] · n[r, k]

    y[r, o] = Σ_g  step[r, g] · scale[o, g] · Σ_k (q[o, k] - zero) · n[r, k]
                 + minimum[o, g] · step[r, g] · Σ_k n[r, k]

The sum over k is of integers, exact in any order, and the sum over g runs in one order: a row's
result does not depend on the batch, nor on how the processor multiplies bytes (`dots.py`).

A panel holds PANEL_COLUMNS columns, group by group; a vector of it is four features of LANES
columns in bytes, or eight in halves of bytes: the first four features in the low halves.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..numbers import INLINED, LANES
from ..panels import PANEL_ROWS, PANEL_VECTORS
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
    to_floats,
    words,
)
from .dots import BYTES, begins_at_offset, dot

UNIT = 16
"""A group's size is a multiple of this many features."""
_VECTOR_BYTES = 4 * LANES
_INT32 = ir.IntType(32)


# Over 50 lines: the code generator is one function within another, in the order of its output.
def _make_add_groups(num_rows):
    @intrinsic
    def add_groups(
        typing_context,
        quants,
        scales,
        minimums,
        panel_group,
        numbers,
        steps,
        sums,
        offsets,
        x_group,
        x_groups,
        group,
        groups,
        out,
        row,
    ):
        """Do what `add_groups` below does, for num_rows rows."""
        bits = 4 if quants.dtype == types.uint8 else 8
        shift = 4 if minimums.dtype == types.int8 else 0  # from 128 to 8

        def generate(context, builder, signature, arguments):
            # Over 50 lines: one part after the other, in the order of the code that it generates.
            arrays = arrays_of(context, builder, signature, arguments, (0, 1, 2, 4, 5, 6, 7, 12))
            quants, scales, minimums, numbers, steps, sums, offsets, out = arrays
            panel_group, x_group, x_groups, group, groups, row = (
                arguments[at] for at in (3, 8, 9, 10, 11, 13)
            )
            panel = [(at, part) for at in range(num_rows) for part in range(PANEL_VECTORS)]
            # 1. The float sums start from what is in `out`, and end there.
            targets, totals, integers = [], [], []
            for at, part in panel:
                place = place_of(builder, out, plus(builder, row, at), index(LANES * part))
                targets.append(pointer_to(builder, out, place))
                totals.append(cgutils.alloca_once(builder, FLOATS))
                integers.append(cgutils.alloca_once(builder, WORDS))
            for target, total in zip(targets, totals, strict=True):
                builder.store(builder.load(target, align=4), total)
            # 2. Where each row's numbers begin, and the panel's bytes.
            row_groups = [
                builder.add(x_group, builder.mul(x_groups, index(at))) for at in range(num_rows)
            ]
            octets = builder.bitcast(quants.data, ir.IntType(8).as_pointer())
            per_group = builder.mul(group, index(PANEL_VECTORS * LANES * bits // 8))
            begin = builder.mul(panel_group, per_group)
            with cgutils.for_range(builder, groups, intp=INDEX) as loop:
                at_groups = [builder.add(first, loop.index) for first in row_groups]
                for at, part in panel:
                    integer = integers[at * PANEL_VECTORS + part]
                    if begins_at_offset(bits) or shift:
                        offset = builder.load(builder.gep(offsets.data, [at_groups[at]]))
                        offset = builder.ashr(offset, ir.Constant(_INT32, shift))
                        builder.store(broadcast(builder, offset), integer)
                    else:
                        builder.store(words(0), integer)
                # 3. The integer sums of one group.
                first_byte = builder.add(begin, builder.mul(loop.index, per_group))
                first_numbers = [builder.mul(each, group) for each in at_groups]
                units = builder.udiv(group, index(UNIT))
                with cgutils.for_range(builder, units, intp=INDEX) as unit:
                    place = builder.add(
                        first_byte,
                        builder.mul(unit.index, index(UNIT * PANEL_VECTORS * LANES * bits // 8)),
                    )
                    before = builder.mul(unit.index, index(UNIT))
                    _add_unit(
                        builder,
                        builder.gep(octets, [place]),
                        [
                            builder.gep(numbers.data, [builder.add(first, before)])
                            for first in first_numbers
                        ],
                        integers,
                        bits,
                    )
                # 4. Times the scales, to the float sums.
                at_panel = builder.add(panel_group, loop.index)
                columns = builder.mul(at_panel, index(PANEL_VECTORS * LANES))
                for part in range(PANEL_VECTORS):
                    place = plus(builder, columns, part * LANES)
                    scale = _column_numbers(builder, signature.args[1].dtype, scales, place)
                    least = _column_numbers(builder, signature.args[2].dtype, minimums, place)
                    for at in range(num_rows):
                        which = at * PANEL_VECTORS + part
                        step = builder.load(builder.gep(steps.data, [at_groups[at]]))
                        step = broadcast(builder, step)
                        exact = builder.sitofp(builder.load(integers[which]), FLOATS)
                        total = builder.load(totals[which])
                        if scale is None:
                            total = fused(builder, exact, step, total)
                        else:
                            total = fused(builder, builder.fmul(exact, step), scale, total)
                        if least is not None:
                            part_sum = builder.load(builder.gep(sums.data, [at_groups[at]]))
                            part_sum = broadcast(builder, part_sum)
                            total = fused(builder, part_sum, least, total)
                        builder.store(total, totals[which])
            for target, total in zip(targets, totals, strict=True):
                builder.store(builder.load(total), target, align=4)
            return context.get_dummy_value()

        integer = types.int64
        kinds = (quants, scales, minimums, integer, numbers, steps, sums, offsets)
        return types.void(*kinds, integer, integer, integer, integer, out, integer), generate

    return add_groups


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


def _column_numbers(builder, number_type, array, place):
    """Return a vector of scales or minimums as float32; None if there are none (uint8)."""
    if number_type in (types.uint8, types.int8):
        return None
    return to_floats(builder, number_type, builder.load(pointer_to(builder, array, place), align=1))


_add_groups_1 = _make_add_groups(1)
_add_groups_2 = _make_add_groups(2)
_add_groups_3 = _make_add_groups(3)
_add_groups_4 = _make_add_groups(4)
_add_groups_5 = _make_add_groups(5)
_add_groups_6 = _make_add_groups(PANEL_ROWS)


@njit(**INLINED)
def add_groups(weight, begin, x, first, stride, group, groups, out, rows):
    """Compute out[:rows, :PANEL_COLUMNS] += the products of `groups` groups.

    `weight` is (quants, scales, minimums) and `begin` counts its groups before them; `x` is
    (numbers, steps, sums, offsets) and `first` counts its groups, of which a row has `stride`. For
    the arrays see `products.IntegerProduct`.
    """
    for at in range(0, np.int64(rows), PANEL_ROWS):
        few = np.int64(rows) - at
        given = (*weight, begin, *x, first + at * stride, stride, group, groups, out, at)
        if few >= PANEL_ROWS:
            _add_groups_6(*given)
        elif few == 5:
            _add_groups_5(*given)
        elif few == 4:
            _add_groups_4(*given)
        elif few == 3:
            _add_groups_3(*given)
        elif few == 2:
            _add_groups_2(*given)
        else:
            _add_groups_1(*given)
