"""Panels: products that keep all sums in vector registers.

Written as LLVM's own instructions, since of loops LLVM makes no such thing: on one core (AMD EPYC
with AVX-512) 230 GFLOP/s where the loop reached 90.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .numbers import INLINED, LANES
from .vectors import (
    FLOATS,
    INDEX,
    arrays_of,
    broadcast,
    fused,
    index,
    place_of,
    plus,
    pointer_to,
    to_floats,
)

PANEL_ROWS, PANEL_VECTORS = 6, 2
PANEL_COLUMNS = PANEL_VECTORS * LANES


def _make_multiply_add(num_rows):
    @intrinsic
    def multiply_add(
        typing_context, left, left_row, left_column, right, places, stride, depth, out, row, column
    ):
        """As `multiply_add` below, for num_rows rows."""

        def generate(context, builder, signature, arguments):
            _, left_row, left_column, _, place, step, depth, _, row, column = arguments
            left, right, out = arrays_of(context, builder, signature, arguments, (0, 3, 7))
            if isinstance(places, types.Array):
                (array,) = arrays_of(context, builder, signature, arguments, (4,))
                pointers = [builder.gep(array.data, [index(at)]) for at in range(PANEL_VECTORS)]
                begins = [builder.load(pointer) for pointer in pointers]
            else:
                begins = [plus(builder, place, LANES * part) for part in range(PANEL_VECTORS)]
            panel = [(at, part) for at in range(num_rows) for part in range(len(begins))]
            targets, sums = [], []
            for at, part in panel:
                place = place_of(builder, out, plus(builder, row, at), column)
                targets.append(pointer_to(builder, out, plus(builder, place, LANES * part)))
                sums.append(cgutils.alloca_once(builder, FLOATS))
            for target, total in zip(targets, sums, strict=True):
                builder.store(builder.load(target, align=4), total)
            with cgutils.for_range(builder, depth, intp=INDEX) as loop:
                if isinstance(stride, types.Array):
                    (array,) = arrays_of(context, builder, signature, arguments, (5,))
                    below = builder.load(builder.gep(array.data, [loop.index]))
                else:
                    below = builder.mul(loop.index, step)
                vectors = []
                for begin in begins:
                    pointer = pointer_to(builder, right, builder.add(begin, below))
                    loaded = builder.load(pointer, align=1)
                    vectors.append(to_floats(builder, signature.args[3].dtype, loaded))
                for (at, part), total in zip(panel, sums, strict=True):
                    if part == 0:
                        across = builder.add(left_column, loop.index)
                        place = place_of(builder, left, plus(builder, left_row, at), across)
                        number = builder.load(builder.gep(left.data, [place]))
                        factor = broadcast(builder, number)
                    product = fused(builder, factor, vectors[part], builder.load(total))
                    builder.store(product, total)
            for target, total in zip(targets, sums, strict=True):
                builder.store(builder.load(total), target, align=4)
            return context.get_dummy_value()

        integer = types.int64
        where, apart = (
            each if isinstance(each, types.Array) else integer for each in (places, stride)
        )
        numbers = (left, integer, integer, right, where, apart, integer, out, integer, integer)
        return types.void(*numbers), generate

    return multiply_add


_multiply_add_1 = _make_multiply_add(1)
_multiply_add_2 = _make_multiply_add(2)
_multiply_add_3 = _make_multiply_add(3)
_multiply_add_4 = _make_multiply_add(4)
_multiply_add_5 = _make_multiply_add(5)
_multiply_add_6 = _make_multiply_add(PANEL_ROWS)


@njit(**INLINED)
def multiply_add(left, left_row, left_column, right, places, stride, depth, out, row, column, rows):
    """out[row : row + rows, column : column + n] +=
    left[left_row : left_row + rows, left_column : left_column + depth] @ `depth` rows of right.

    The first of those rows begins at `places`: PANEL_COLUMNS numbers from one place on, or LANES
    from each of an array of PANEL_VECTORS places. The next begins `stride` further on; or `stride`
    `[depth]` says where each begins, relative to `places`. Contiguous; left and out `[., .]`
    float32, right of any shape as `to_float` reads it, or int8.
    """
    for begin in range(0, np.int64(rows), PANEL_ROWS):
        few = np.int64(rows) - begin
        at, to = np.int64(left_row) + begin, np.int64(row) + begin
        if few >= PANEL_ROWS:
            _multiply_add_6(left, at, left_column, right, places, stride, depth, out, to, column)
        elif few == 5:
            _multiply_add_5(left, at, left_column, right, places, stride, depth, out, to, column)
        elif few == 4:
            _multiply_add_4(left, at, left_column, right, places, stride, depth, out, to, column)
        elif few == 3:
            _multiply_add_3(left, at, left_column, right, places, stride, depth, out, to, column)
        elif few == 2:
            _multiply_add_2(left, at, left_column, right, places, stride, depth, out, to, column)
        else:
            _multiply_add_1(left, at, left_column, right, places, stride, depth, out, to, column)
