"""Panels: products that keep all sums in vector registers, and what feeds them.

Written as LLVM's own instructions, since of loops LLVM makes no such thing: on one core (AMD EPYC
with AVX-512) 230 GFLOP/s where the loop reached 90.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .cpu_numbers import FAST, LANES, stay_apart

PANEL_ROWS, PANEL_VECTORS = 6, 2
PANEL_COLUMNS = PANEL_VECTORS * LANES
"""The panel of `multiply_add`."""
WIDE_VECTORS = 4 if LANES == 16 else 2
WIDE_COLUMNS = WIDE_VECTORS * LANES
"""The panel of `multiply_add_few`."""

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INDEX = ir.IntType(64)


def _plus(builder, number, constant):
    return builder.add(number, ir.Constant(_INDEX, constant))


def _place(builder, array, row, column):
    """Of an element of a contiguous `[., n]`, counted in memory's order."""
    return builder.add(builder.mul(row, builder.extract_value(array.shape, 1)), column)


def _vectors_at(builder, array, place):
    pointer = builder.gep(array.data, [place])
    vector = ir.VectorType(array.data.type.pointee, LANES)
    return builder.bitcast(pointer, vector.as_pointer())


def _emit_panel(builder, num_rows, left, right, right_type, right_places, stride, depth, out):
    """out += left @ right. left and out are (array, row, column); right's rows of vectors begin at
    `right_places` and lie `stride` apart."""
    num_vectors = len(right_places)
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{LANES}f32"
    )
    array, row, column = out
    panel = [(at, part) for at in range(num_rows) for part in range(num_vectors)]
    targets = []
    for at, part in panel:
        place = _place(builder, array, _plus(builder, row, at), column)
        targets.append(_vectors_at(builder, array, _plus(builder, place, LANES * part)))
    sums = [cgutils.alloca_once(builder, _FLOATS) for _ in panel]
    for target, total in zip(targets, sums, strict=True):
        builder.store(builder.load(target, align=4), total)
    array, row, column = left
    with cgutils.for_range(builder, depth, intp=_INDEX) as loop:
        below = builder.mul(loop.index, stride)
        parts = []
        for place in right_places:
            loaded = builder.load(_vectors_at(builder, right, builder.add(place, below)), align=2)
            parts.append(_vector_to_float(builder, right_type, loaded))
        for (at, part), total in zip(panel, sums, strict=True):
            if part == 0:
                across = builder.add(column, loop.index)
                place = _place(builder, array, _plus(builder, row, at), across)
                factor = _broadcast(builder, builder.load(builder.gep(array.data, [place])))
            product = builder.call(fma, [factor, parts[part], builder.load(total)])
            builder.store(product, total)
    for target, total in zip(targets, sums, strict=True):
        builder.store(builder.load(total), target, align=4)


def _make_multiply_add(num_rows):
    @intrinsic
    def multiply_add(
        typing_context, left, left_row, left_column, right, right_row, right_column, depth, out, row
    ):
        """As `multiply_add` below, for num_rows rows."""

        def generate(context, builder, signature, arguments):
            left, left_row, left_column, right, right_row, right_column, depth, out, row = arguments
            left, right, out = _arrays(context, builder, signature, arguments, (0, 3, 7))
            place = _place(builder, right, right_row, right_column)
            places = [_plus(builder, place, LANES * part) for part in range(PANEL_VECTORS)]
            stride = builder.extract_value(right.shape, 1)
            rows, sums = (left, left_row, left_column), (out, row, right_column)
            kind = signature.args[3].dtype
            _emit_panel(builder, num_rows, rows, right, kind, places, stride, depth, sums)
            return context.get_dummy_value()

        integer = types.int64
        numbers = (left, integer, integer, right, integer, integer, integer, out, integer)
        return types.void(*numbers), generate

    return multiply_add


_multiply_add_1 = _make_multiply_add(1)
_multiply_add_2 = _make_multiply_add(2)
_multiply_add_3 = _make_multiply_add(3)
_multiply_add_4 = _make_multiply_add(4)
_multiply_add_6 = _make_multiply_add(PANEL_ROWS)


@njit(**FAST)
def multiply_add(
    left, left_row, left_column, right, right_row, right_column, depth, out, row, rows
):
    """out[row : row + rows, right_column : right_column + PANEL_COLUMNS] +=
    left[left_row : left_row + rows, left_column : left_column + depth] @
    right[right_row : right_row + depth, right_column : right_column + PANEL_COLUMNS].

    Contiguous; left and out float32, right as `to_float` reads it, or int8. Rows are rounded up to
    PANEL_ROWS, and must be there.
    """
    stay_apart()
    for begin in range(0, np.int64(rows), PANEL_ROWS):
        few = np.int64(rows) - begin
        at, to = np.int64(left_row) + begin, row + begin
        if few > 4:
            _multiply_add_6(left, at, left_column, right, right_row, right_column, depth, out, to)
        elif few == 4:
            _multiply_add_4(left, at, left_column, right, right_row, right_column, depth, out, to)
        elif few == 3:
            _multiply_add_3(left, at, left_column, right, right_row, right_column, depth, out, to)
        elif few == 2:
            _multiply_add_2(left, at, left_column, right, right_row, right_column, depth, out, to)
        else:
            _multiply_add_1(left, at, left_column, right, right_row, right_column, depth, out, to)


def _make_multiply_few(num_rows):
    @intrinsic
    def multiply_few(
        typing_context, left, left_row, left_column, right, places, stride, depth, out, row, column
    ):
        """As `multiply_few` below, for num_rows rows."""

        def generate(context, builder, signature, arguments):
            left, left_row, left_column, _, _, stride, depth, _, row, column = arguments
            left, right, places, out = _arrays(context, builder, signature, arguments, (0, 3, 4, 7))
            begins = [
                builder.load(builder.gep(places.data, [ir.Constant(_INDEX, part)]))
                for part in range(WIDE_VECTORS)
            ]
            rows, sums = (left, left_row, left_column), (out, row, column)
            kind = signature.args[3].dtype
            _emit_panel(builder, num_rows, rows, right, kind, begins, stride, depth, sums)
            return context.get_dummy_value()

        integer = types.int64
        numbers = (left, integer, integer, right, places, integer, integer, out, integer, integer)
        return types.void(*numbers), generate

    return multiply_few


_multiply_few_1 = _make_multiply_few(1)
_multiply_few_2 = _make_multiply_few(2)
_multiply_few_3 = _make_multiply_few(3)
_multiply_few_4 = _make_multiply_few(4)


@njit(**FAST)
def multiply_few(left, left_column, right, places, stride, depth, out, column, rows):
    """out[:rows, column : column + WIDE_COLUMNS] += left[:rows, left_column : left_column + depth]
    @ rows of WIDE_VECTORS vectors of LANES numbers, the first of which begin at `places` of right,
    counted in memory's order, the next `stride` further on. Contiguous; left and out `[., .]`
    float32, right of any shape as `to_float` reads it.
    """
    stay_apart()
    for row in range(0, np.int64(rows), 4):
        few = np.int64(rows) - row
        if few >= 4:
            _multiply_few_4(left, row, left_column, right, places, stride, depth, out, row, column)
        elif few == 3:
            _multiply_few_3(left, row, left_column, right, places, stride, depth, out, row, column)
        elif few == 2:
            _multiply_few_2(left, row, left_column, right, places, stride, depth, out, row, column)
        else:
            _multiply_few_1(left, row, left_column, right, places, stride, depth, out, row, column)


@intrinsic
def prefetch(typing_context, numbers, at):
    """Ask for the cache line of an element, counted in memory's order."""

    def generate(context, builder, signature, arguments):
        (array,) = _arrays(context, builder, signature, arguments, (0,))
        integer, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, integer, integer, integer])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), pointer)
        builder.call(function, [place, *(ir.Constant(integer, number) for number in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(numbers, types.int64), generate


@intrinsic
def copy_lanes(typing_context, numbers, at, out, to):
    """LANES elements of contiguous arrays, counted in memory's order from `at` and `to`; of any
    type to float32. Slices would cost more than the copying."""

    def generate(context, builder, signature, arguments):
        numbers, out = _arrays(context, builder, signature, arguments, (0, 2))
        loaded = builder.load(_vectors_at(builder, numbers, arguments[1]), align=2)
        floats = _vector_to_float(builder, signature.args[0].dtype, loaded)
        builder.store(floats, _vectors_at(builder, out, arguments[3]), align=4)
        return context.get_dummy_value()

    return types.void(numbers, types.int64, out, types.int64), generate


def _arrays(context, builder, signature, arguments, places):
    return [
        cgutils.create_struct_proxy(signature.args[at])(context, builder, arguments[at])
        for at in places
    ]


def _vector_to_float(builder, number_type, vector):
    """As `to_float`; int8, too."""
    if number_type == types.float32:
        return vector
    if number_type == types.int16:
        halves = ir.VectorType(ir.HalfType(), LANES)
        return builder.fpext(builder.bitcast(vector, halves), _FLOATS)
    words = ir.VectorType(ir.IntType(32), LANES)
    if number_type == types.int8:
        return builder.sitofp(builder.sext(vector, words), _FLOATS)
    shift = ir.Constant(words, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(vector, words), shift), _FLOATS)


def _broadcast(builder, number):
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, undefined, places)
