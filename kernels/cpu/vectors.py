"""Vectors of LANES numbers in LLVM's own instructions, for code that Numba would not make fast.

Every function here builds instructions with llvmlite and returns the LLVM value that holds their
result. Arrays are contiguous; the place of an element is its index in memory order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .numbers import EXP_TERMS, LANES, LOG2_E

FLOATS = ir.VectorType(ir.FloatType(), LANES)
WORDS = ir.VectorType(ir.IntType(32), LANES)
INDEX = ir.IntType(64)


def arrays_of(context, builder, signature, arguments, places):
    """Return the arguments at `places` as array structures, which have data and shape."""
    return [
        cgutils.create_struct_proxy(signature.args[at])(context, builder, arguments[at])
        for at in places
    ]


def index(number):
    """Return a constant index."""
    return ir.Constant(INDEX, number)


def plus(builder, number, constant):
    """Return an index plus a Python int."""
    return builder.add(number, index(constant))


def place_of(builder, array, row, column):
    """Return the place of an element of a `[., n]` array."""
    return builder.add(builder.mul(row, builder.extract_value(array.shape, 1)), column)


def pointer_to(builder, array, place):
    """Return a pointer to the vector of LANES numbers from `place` on."""
    pointer = builder.gep(array.data, [place])
    vector = ir.VectorType(array.data.type.pointee, LANES)
    return builder.bitcast(pointer, vector.as_pointer())


def to_floats(builder, number_type, vector):
    """Convert a vector to float32 as `numbers.to_float` converts a number, or from int8."""
    if number_type == types.float32:
        return vector
    if number_type == types.int16:
        halves = ir.VectorType(ir.HalfType(), LANES)
        return builder.fpext(builder.bitcast(vector, halves), FLOATS)
    if number_type == types.int8:
        return builder.sitofp(builder.sext(vector, WORDS), FLOATS)
    return builder.bitcast(builder.shl(builder.zext(vector, WORDS), words(16)), FLOATS)


def broadcast(builder, number):
    """Return a vector with a float or an int32 in all lanes."""
    undefined = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, words(0))


def words(number):
    """Return a constant vector of int32."""
    return ir.Constant(WORDS, [number] * LANES)


def floats(number):
    """Return a constant vector of float32."""
    return ir.Constant(FLOATS, [float(number)] * LANES)


def fused(builder, left, right, addend):
    """Return left * right + addend, rounded once."""
    name, kind = f"llvm.fma.v{LANES}f32", ir.FunctionType(FLOATS, [FLOATS] * 3)
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, name), [left, right, addend]
    )


def prefetch(builder, pointer, level=1):
    """Ask for the cache line of an address, which need not be one of the process's, into the cache
    of a level."""
    number = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    reads, near, is_data = (ir.Constant(number, each) for each in (0, 4 - level, 1))
    builder.call(function, [pointer, reads, near, is_data])


def greater(builder, left, right):
    """Return the greater one in each lane; right's if one is NaN."""
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


def across(builder, combine, vector):
    """Combine all lanes; every lane of the result has it. Halves are swapped, then quarters, …"""
    half = LANES // 2
    while half:
        turned = ir.Constant(WORDS, [lane ^ half for lane in range(LANES)])
        vector = combine(vector, builder.shuffle_vector(vector, vector, turned))
        half //= 2
    return vector


def exponential(builder, x):
    """Return e^x as `numbers.exp` computes it."""
    y = builder.fmul(x, floats(LOG2_E))
    y = builder.select(builder.fcmp_ordered("<", y, floats(-126)), floats(-126), y)
    y = builder.select(builder.fcmp_ordered(">", y, floats(126)), floats(126), y)
    n = builder.sub(builder.fptosi(builder.fadd(y, floats(126.5)), WORDS), words(126))
    f = builder.fsub(y, builder.sitofp(n, FLOATS))
    power = floats(EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        power = fused(builder, power, f, floats(term))
    scale = builder.shl(builder.add(n, words(127)), words(23))
    return builder.fmul(power, builder.bitcast(scale, FLOATS))
