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
from ..products import HEAD_BYTES, QUANTISED_ROWS
from ..vectors import FLOATS, WORDS, arrays_of, broadcast, floats, index, plus, words
from .dots import ZERO_OF_BYTES

_LEAST = float(np.float32(1e-30))
_MAGIC, _MAGIC_BITS = 1.5 * 2**23, 0x4B400000
_INT32, _FLOAT = ir.IntType(32), ir.FloatType()


class Quantise(NamedTuple):
    """Rows to be quantised."""

    x: Any
    """`[., in_features]` float32."""
    records: Any
    """As in Quantised."""
    group: int
    """Features per group; the last group may have fewer, and is filled up with zeros."""
    groups: int
    tiles: Any
    """Scratch of `products.make_tiles`."""


@kernel
def quantise(item, layer, rows, thread, work):
    """Quantise an item's rows."""
    x, records, group, groups = work.x, work.records, work.group, work.groups
    rest = work.tiles[thread].reshape(-1)
    whole = x.shape[1] // group
    for row in range(item * QUANTISED_ROWS, min((item + 1) * QUANTISED_ROWS, rows)):
        first = row * groups
        line = x[row]
        for at in range(whole):
            _quantise_group(line, at * group, group, records, first + at)
        if whole < groups:
            begin = whole * group
            for feature in range(group):
                inside = begin + feature < x.shape[1]
                rest[feature] = line[begin + feature] if inside else np.float32(0)
            _quantise_group(rest, 0, group, records, first + whole)


# Over 50 lines: the code generator is one function within another, in the order of its output.
@intrinsic
def _quantise_group(typing_context, x, begin, group, records, at):
    """Write x[begin : begin + group] as record `at`: see `groups.py`."""

    def generate(context, builder, signature, arguments):
        # Over 50 lines: one part after the other, in the order of the code that it generates.
        x, records = arrays_of(context, builder, signature, arguments, (0, 3))
        _, begin, group, _, at = arguments
        vectors = builder.udiv(group, index(LANES))
        source = builder.gep(x.data, [begin])
        record = builder.mul(at, plus(builder, group, HEAD_BYTES))
        head = builder.gep(records.data, [record])
        target = builder.gep(head, [index(HEAD_BYTES)])

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
        bits = _across(builder, "smax", builder.load(greatest))
        most = builder.bitcast(bits, _FLOAT)
        # 2. Its step, and what x is multiplied by, if the group is to be rounded.
        is_finite = builder.icmp_signed("<", bits, ir.Constant(_INT32, 0x7F800000))
        is_regular = builder.fcmp_ordered(">=", most, ir.Constant(_FLOAT, _LEAST))
        is_regular = builder.and_(is_finite, is_regular)
        factor = broadcast(builder, builder.fdiv(ir.Constant(_FLOAT, 127.0), most))
        step = builder.fmul(most, ir.Constant(_FLOAT, float(np.float32(1 / 127))))
        is_nothing = builder.and_(is_finite, builder.not_(is_regular))
        step = builder.select(is_nothing, ir.Constant(_FLOAT, 0.0), step)
        # 3. The nearest integers, ties to even, and their sum. A float of 1.5 · 2^23 plus a small
        #    number is rounded to an integer, which is what its bits are greater by.
        total = cgutils.alloca_once_value(builder, words(0))
        octets = ir.VectorType(ir.IntType(8), LANES)
        with cgutils.for_range(builder, vectors, intp=vectors.type) as loop:
            scaled = builder.fmul(vector_of(loop.index), factor)
            scaled = builder.select(is_regular, scaled, floats(0))
            rounded = builder.bitcast(builder.fadd(scaled, floats(_MAGIC)), WORDS)
            integers = builder.sub(rounded, words(_MAGIC_BITS))
            pointer = builder.gep(target, [builder.mul(loop.index, index(LANES))])
            pointer = builder.bitcast(pointer, octets.as_pointer())
            builder.store(builder.trunc(integers, octets), pointer, align=1)
            builder.store(builder.add(builder.load(total), integers), total)
        # 4. The record's head: the step, step times sum, and the offset.
        added = _across(builder, "add", builder.load(total))
        scaled = builder.fmul(step, builder.sitofp(added, _FLOAT))
        offset = builder.mul(added, ir.Constant(_INT32, -ZERO_OF_BYTES))
        for place, number in enumerate((step, scaled, offset)):
            pointer = builder.gep(head, [index(4 * place)])
            builder.store(number, builder.bitcast(pointer, number.type.as_pointer()), align=4)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(x, integer, integer, records, integer), generate


def _greater(builder, left, right):
    return builder.select(builder.icmp_signed(">", left, right), left, right)


def _across(builder, name, vector):
    """Combine all lanes of a vector of int32 to one number."""
    kind = ir.FunctionType(_INT32, [WORDS])
    name = f"llvm.vector.reduce.{name}.v{LANES}i32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [vector])
