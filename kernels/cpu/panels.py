"""Panels: small products whose sums stay in vector registers.

A panel is `rows` x PANEL_COLUMNS sums, one register for each row and vector of columns:

                      PANEL_VECTORS vectors of LANES numbers
    right   row k     [ · · · · · · · · | · · · · · · · · ]
                        ×                                     fused multiply-add, one per register
    left    row i  a ─► [ sums i, 0     |  sums i, 1      ]   a = left[i, k], in all lanes

For each k, a row of right is loaded once and used for all rows. Six rows of two vectors are twelve
sums, so that a vector of right, and the broadcast number of left, fit the sixteen registers of AVX2
too, and there are enough independent sums to hide a multiply-add's latency. AVX-512 has registers
for twelve rows, which read right, and make floats of its numbers, half as often.

The code is built from LLVM's own instructions, because LLVM does not make it of loops: on one core
(AMD EPYC with AVX-512) it reaches 230 GFLOP/s where the loop reached 90.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
from llvmlite import ir
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
"""Maximum rows, and vectors of columns, whose sums are in registers together."""
PANEL_COLUMNS = PANEL_VECTORS * LANES
TALL_ROWS = 2 * PANEL_ROWS if LANES == 16 else PANEL_ROWS
"""Rows of a panel if there are as many."""


@njit(**INLINED)
def multiply_add(left, left_row, left_column, right, places, stride, depth, out, row, column, rows):
    """Compute out[row : row + rows, column : column + PANEL_COLUMNS] +=
    left[left_row : left_row + rows, left_column : left_column + depth] @ `depth` rows of right.

    The first of those rows begins at `places`: PANEL_COLUMNS numbers from one place on, or LANES
    numbers from each of an array of PANEL_VECTORS places. The next row begins `stride` further on;
    or else `stride` is an array `[depth]` of where each row begins, relative to `places`. All
    arrays are contiguous; left and out `[., .]` are float32, right has any shape and a type that
    `to_float` reads, or int8.
    """
    begin, end = np.int64(0), np.int64(rows)
    while begin < end:
        few = min(end - begin, np.int64(PANEL_ROWS))
        if end - begin >= TALL_ROWS:
            few = np.int64(TALL_ROWS)
        at, to = np.int64(left_row) + begin, np.int64(row) + begin
        _multiply_add(left, at, left_column, right, places, stride, depth, out, to, column, few)
        begin += few


def for_row_counts(builder, rows, counts, generate):
    """Generate a switch over `rows`, which are one of `counts`: each case is what `generate(rows)`
    generates for that many, whose sums fit the registers."""
    end = builder.append_basic_block("rows.end")
    switch = builder.switch(rows, end)
    for count in counts:
        block = builder.append_basic_block(f"rows.{count}")
        switch.add_case(ir.Constant(INDEX, count), block)
        builder.position_at_end(block)
        generate(count)
        builder.branch(end)
    builder.position_at_end(end)


@intrinsic
def _multiply_add(
    typing_context,
    left,
    left_row,
    left_column,
    right,
    places,
    stride,
    depth,
    out,
    row,
    column,
    rows,
):
    """Do what `multiply_add` does, for at most PANEL_ROWS rows or for TALL_ROWS."""

    def generate(context, builder, signature, arguments):
        arrays = arrays_of(context, builder, signature, arguments, (0, 3, 7))
        begins = _begins(context, builder, signature, arguments)

        def row_begin(row):
            return _row_begin(context, builder, signature, arguments, row)

        def add_rows(count):
            number_type = signature.args[3].dtype
            _add_rows(builder, count, arrays, arguments, number_type, begins, row_begin)

        counts = sorted({*range(1, PANEL_ROWS + 1), TALL_ROWS})
        for_row_counts(builder, arguments[10], counts, add_rows)
        return context.get_dummy_value()

    integer = types.int64
    where, apart = (each if isinstance(each, types.Array) else integer for each in (places, stride))
    numbers = (left, integer, integer, right, where, apart, integer, out, integer, integer, integer)
    return types.void(*numbers), generate


def _add_rows(builder, count, arrays, arguments, number_type, begins, row_begin):
    """Generate the code for `count` rows."""
    left, right, out = arrays
    left_row, left_column, depth, row, column = (arguments[at] for at in (1, 2, 6, 8, 9))
    panel = [(at, part) for at in range(count) for part in range(PANEL_VECTORS)]
    # 1. The sums start from what is in `out`. Each one has a stack slot, which LLVM turns into a
    #    register, since nothing takes its address.
    targets, sums = [], []
    for at, part in panel:
        place = place_of(builder, out, plus(builder, row, at), column)
        targets.append(pointer_to(builder, out, plus(builder, place, LANES * part)))
        sums.append(cgutils.alloca_once(builder, FLOATS))
    for target, total in zip(targets, sums, strict=True):
        builder.store(builder.load(target, align=4), total)
    with cgutils.for_range(builder, depth, intp=INDEX) as loop:
        # 2. A row of right, as float32.
        below = row_begin(loop.index)
        vectors = []
        for begin in begins:
            pointer = pointer_to(builder, right, builder.add(begin, below))
            vectors.append(to_floats(builder, number_type, builder.load(pointer, align=1)))
        # 3. For each row of left, its number of this column times that.
        for (at, part), total in zip(panel, sums, strict=True):
            if part == 0:
                across = builder.add(left_column, loop.index)
                place = place_of(builder, left, plus(builder, left_row, at), across)
                factor = broadcast(builder, builder.load(builder.gep(left.data, [place])))
            builder.store(fused(builder, factor, vectors[part], builder.load(total)), total)
    # 4. The sums go back to `out`.
    for target, total in zip(targets, sums, strict=True):
        builder.store(builder.load(total), target, align=4)


def _begins(context, builder, signature, arguments):
    """Return where each vector of the first row of right begins: from an array, or side by side."""
    if isinstance(signature.args[4], types.Array):
        (array,) = arrays_of(context, builder, signature, arguments, (4,))
        pointers = [builder.gep(array.data, [index(at)]) for at in range(PANEL_VECTORS)]
        return [builder.load(pointer) for pointer in pointers]
    return [plus(builder, arguments[4], LANES * part) for part in range(PANEL_VECTORS)]


def _row_begin(context, builder, signature, arguments, row):
    """Return where a row of right begins, relative to the first: from an array, or row * step."""
    if isinstance(signature.args[5], types.Array):
        (array,) = arrays_of(context, builder, signature, arguments, (5,))
        return builder.load(builder.gep(array.data, [row]))
    return builder.mul(row, arguments[5])
