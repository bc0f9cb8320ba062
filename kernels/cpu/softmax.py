"""The softmax of a tile of attention scores, one row at a time, in vector registers.

This is a step of the online softmax (Milakov & Gimelshein, arXiv 1805.02867): with the greatest
score m' = max(m, scores), a tile contributes weights e^(score - m') and their sum. The caller
rescales what it has summed up so far by e^(m - m').
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from functools import partial

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .numbers import LANES
from .vectors import (
    WORDS,
    across,
    arrays_of,
    broadcast,
    exponential,
    floats,
    greater,
    index,
    place_of,
    plus,
    pointer_to,
)

KEYS = 64
"""Keys per tile."""


@intrinsic
def weigh(typing_context, scores, row, begin, end, least):
    """Turn scores[row, begin:end] into weights e^(score - greatest) and the rest of the row's KEYS
    into 0; return the greatest of the scores and of `least`, and the sum of the weights. A NaN
    among the scores shows in the sum.

    scores `[., KEYS]` is contiguous float32. The loop that LLVM made of Python's took 4 cycles a
    key.
    """

    def generate(context, builder, signature, arguments):
        # 1. The row as KEYS / LANES vectors.
        (array,) = arrays_of(context, builder, signature, arguments, (0,))
        _, row, begin, end, least = arguments
        place = place_of(builder, array, row, index(0))
        pointers = [
            pointer_to(builder, array, plus(builder, place, at)) for at in range(0, KEYS, LANES)
        ]
        low, high = (
            broadcast(builder, builder.trunc(each, ir.IntType(32))) for each in (begin, end)
        )
        # 2. The greatest score, in all lanes; keys outside of [begin, end) count as -inf.
        greatest, seen, visible = broadcast(builder, least), [], []
        for at, pointer in enumerate(pointers):
            keys = ir.Constant(WORDS, list(range(at * LANES, (at + 1) * LANES)))
            seen.append(
                builder.and_(
                    builder.icmp_signed(">=", keys, low), builder.icmp_signed("<", keys, high)
                )
            )
            loaded = builder.load(pointer, align=4)
            visible.append(builder.select(seen[at], loaded, floats("-inf")))
            greatest = greater(builder, visible[at], greatest)
        greatest = across(builder, partial(greater, builder), greatest)
        # 3. The weights and their sum. Keys that are not seen are 0 even if all scores are -inf,
        #    for which the exponential gives NaN.
        total = floats(0)
        for at, pointer in enumerate(pointers):
            weights = exponential(builder, builder.fsub(visible[at], greatest))
            weights = builder.select(seen[at], weights, floats(0))
            builder.store(weights, pointer, align=4)
            total = builder.fadd(total, weights)
        total = across(builder, builder.fadd, total)
        # 4. Lane 0 of both.
        first = ir.Constant(ir.IntType(32), 0)
        numbers = [builder.extract_element(vector, first) for vector in (greatest, total)]
        return context.make_tuple(builder, signature.return_type, numbers)

    integer = types.int64
    numbers = (scores, integer, integer, integer, types.float32)
    return types.UniTuple(types.float32, 2)(*numbers), generate
