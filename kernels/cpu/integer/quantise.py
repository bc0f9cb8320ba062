"""Rows of x as integers of 8 bits, with a step for each group of features.

    step = max |x| / 127 of the group,  n = the integer nearest to x / step,  so that x ≈ step · n

A group that has a NaN or an infinity gets that as its step, and with it every sum it goes into. A
group of zeros, or of numbers below 1e-30, becomes zeros.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..kernel import kernel
from ..numbers import LANES
from ..products import QUANTISED_ROWS
from ..vectors import FLOATS, WORDS, across, arrays_of, floats, index, words
from .dots import ZERO_OF_BYTES

_LEAST = 1e-30


class Quantise(NamedTuple):
    """Rows to be quantised."""

    x: Any
    """`[., in_features]` float32."""
    numbers: Any
    """This and the next three are as in Quantised."""
    steps: Any
    sums: Any
    offsets: Any
    group: int
    """Features per group; the last group may have fewer, and is filled up with zeros."""
    groups: int
    tiles: Any
    """Scratch of `products.make_tiles`."""


@kernel
def quantise(item, layer, rows, thread, work):
    """Quantise an item's rows."""
    x, numbers, steps = work.x, work.numbers, work.steps
    sums, offsets, group, groups = work.sums, work.offsets, work.group, work.groups
    rest = work.tiles[thread].reshape(-1)
    whole = x.shape[1] // group
    for row in range(item * QUANTISED_ROWS, min((item + 1) * QUANTISED_ROWS, rows)):
        first = row * groups
        line = x[row]
        for at in range(whole):
            _quantise_group(line, at * group, group, numbers, steps, sums, offsets, first + at)
        if whole < groups:
            begin = whole * group
            for feature in range(group):
                inside = begin + feature < x.shape[1]
                rest[feature] = line[begin + feature] if inside else np.float32(0)
            _quantise_group(rest, 0, group, numbers, steps, sums, offsets, first + whole)


# Over 50 lines: the code generator is one function within another, in the order of its output.
@intrinsic
def _quantise_group(typing_context, x, begin, group, numbers, steps, sums, offsets, at):
    """Quantise x[begin : begin + group] as group `at`."""

    def generate(context, builder, signature, arguments):
        arrays = arrays_of(context, builder, signature, arguments, (0, 3, 4, 5, 6))
        x, numbers, steps, sums, offsets = arrays
        _, begin, group, _, _, _, _, at = arguments
        vectors = builder.udiv(group, index(LANES))
        source = builder.gep(x.data, [begin])
        target = builder.gep(numbers.data, [builder.mul(at, group)])

        def vector_of(number):
            pointer = builder.gep(source, [builder.mul(number, index(LANES))])
            return builder.load(builder.bitcast(pointer, FLOATS.as_pointer()), align=4)

        # 1. The greatest magnitude. As integers, floats without sign are in the same order, with
        #    infinity and then NaN at the end, so that neither gets lost.
        greatest = cgutils.alloca_once_value(builder, words(0))
        with cgutils.for_range(builder, vectors, intp=vectors.type) as loop:
            bits = builder.bitcast(vector_of(loop.index), WORDS)
            bits = builder.and_(bits, words(0x7FFFFFFF))
            builder.store(_greater(builder, bits, builder.load(greatest)), greatest)
        bits = across(builder, lambda a, b: _greater(builder, a, b), builder.load(greatest))
        most = builder.bitcast(bits, FLOATS)
        # 2. Its step, and what x is multiplied by; zero if the group is not to be rounded.
        finite = builder.icmp_signed("<", bits, words(0x7F800000))
        regular = builder.and_(finite, builder.fcmp_ordered(">=", most, floats(_LEAST)))
        factor = builder.select(regular, builder.fdiv(floats(127), most), floats(0))
        step = builder.fmul(most, floats(np.float32(1 / 127)))
        step = builder.select(builder.and_(finite, builder.not_(regular)), floats(0), step)
        # 3. The nearest integers, ties to even, and their sum. (The conversion saturates, which
        #    only says what it makes of a NaN.)
        total = cgutils.alloca_once_value(builder, words(0))
        octets = ir.VectorType(ir.IntType(8), LANES)
        with cgutils.for_range(builder, vectors, intp=vectors.type) as loop:
            scaled = builder.fmul(vector_of(loop.index), factor)
            rounded = _call(builder, f"llvm.rint.v{LANES}f32", FLOATS, scaled)
            integers = _call(builder, f"llvm.fptosi.sat.v{LANES}i32.v{LANES}f32", WORDS, rounded)
            pointer = builder.gep(target, [builder.mul(loop.index, index(LANES))])
            pointer = builder.bitcast(pointer, octets.as_pointer())
            builder.store(builder.trunc(integers, octets), pointer, align=1)
            builder.store(builder.add(builder.load(total), integers), total)
        added = across(builder, builder.add, builder.load(total))
        # 4. Lane 0 of what goes with the group.
        first = ir.Constant(ir.IntType(32), 0)
        scaled = builder.fmul(step, builder.sitofp(added, FLOATS))
        offset = builder.mul(added, words(-ZERO_OF_BYTES))
        for array, vector in ((steps, step), (sums, scaled), (offsets, offset)):
            lane = builder.extract_element(vector, first)
            builder.store(lane, builder.gep(array.data, [at]))
        return context.get_dummy_value()

    integer = types.int64
    return types.void(x, integer, integer, numbers, steps, sums, offsets, integer), generate


def _greater(builder, left, right):
    return builder.select(builder.icmp_signed(">", left, right), left, right)


def _call(builder, name, result, argument):
    kind = ir.FunctionType(result, [argument.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [argument])
