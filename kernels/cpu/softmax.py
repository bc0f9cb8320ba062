"""The softmax of a tile of attention scores, one row at a time, in vector registers."""
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
"""Of a tile."""


@intrinsic
def weigh(typing_context, scores, row, begin, end, least):
    """scores[row, begin:end] → e^(score - greatest), the rest of the row's KEYS → 0; (greatest of
    the scores and of `least`, sum of the weights). A NaN turns up in the sum.

    scores `[., KEYS]` contiguous float32. The loop over the keys, as LLVM makes it of Python's,
    took 4 cycles a key.
    """

    def generate(context, builder, signature, arguments):
        (array,) = arrays_of(context, builder, signature, arguments, (0,))
        _, row, begin, end, least = arguments
        place = place_of(builder, array, row, index(0))
        pointers = [
            pointer_to(builder, array, plus(builder, place, at)) for at in range(0, KEYS, LANES)
        ]
        low, high = (
            broadcast(builder, builder.trunc(each, ir.IntType(32))) for each in (begin, end)
        )
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
        total = floats(0)
        for at, pointer in enumerate(pointers):
            weights = exponential(builder, builder.fsub(visible[at], greatest))
            weights = builder.select(seen[at], weights, floats(0))
            builder.store(weights, pointer, align=4)
            total = builder.fadd(total, weights)
        total = across(builder, builder.fadd, total)
        first = ir.Constant(ir.IntType(32), 0)
        numbers = [builder.extract_element(vector, first) for vector in (greatest, total)]
        return context.make_tuple(builder, signature.return_type, numbers)

    integer = types.int64
    numbers = (scores, integer, integer, integer, types.float32)
    return types.UniTuple(types.float32, 2)(*numbers), generate
