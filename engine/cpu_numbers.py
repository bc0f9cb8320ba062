"""Numbers as Numba's kernels read and write them: three float types, and a fast exponential.

NumPy knows no bfloat16, and Numba no half floats on the CPU. So arrays of them travel as their
bits, bfloat16 as uint16 and float16 as int16 (`as_array`), and all arithmetic is in float32.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}

# Sums may be reordered and fused, but nothing is assumed about NaN and infinity: a NaN in a
# sequence's cache must come out as one.
FAST = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "nogil": True, "cache": True}


# Loops over prange alone become parallel. Their bodies are functions of their own, which Numba's
# analysis of parallel code, slow on long ones, does not look into.
_OTHERS = ["comprehension", "fusion", "inplace_binop", "numpy", "reduction", "setitem", "stencil"]
PARALLEL = {**FAST, "parallel": {"prange": True} | dict.fromkeys(_OTHERS, False)}

LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
PANEL_ROWS, PANEL_VECTORS = 6, 2
PANEL_COLUMNS = PANEL_VECTORS * LANES
"""The panel of a product that `multiply_add` keeps in registers."""


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same memory, contiguous, as the kernels below take it."""
    bits = _BITS.get(tensor.dtype)
    tensor = tensor.contiguous()
    return (tensor if bits is None else tensor.view(bits)).numpy()


@intrinsic
def _float_from_bits(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_from_float(typing_context, number):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _float_from_half(typing_context, bits):
    def generate(context, builder, signature, arguments):
        half = builder.bitcast(arguments[0], ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _half_from_float(typing_context, number):
    def generate(context, builder, signature, arguments):
        half = builder.fptrunc(arguments[0], ir.HalfType())
        return builder.bitcast(half, ir.IntType(16))

    return types.int16(types.float32), generate


@intrinsic
def fetch_add(typing_context, counter, amount):
    """Add to `counter[0]` (int64), atomically; what stood there before."""

    def generate(context, builder, signature, arguments):
        array = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, arguments[1], "monotonic")

    return types.int64(counter, types.int64), generate


@intrinsic
def multiply_add(typing_context, left, right, depth, out, row, column):
    """The panel of `out` at (row, column) += left[row : row + PANEL_ROWS, :depth] @
    right[:depth, column : column + PANEL_COLUMNS]; float32, contiguous.

    All its sums stay in registers while the depth goes by: 230 GFLOP/s on one core where a loop
    that LLVM made vectors of reached 90 (AMD EPYC with AVX-512).
    """

    def generate(context, builder, signature, arguments):
        left, right, depth, out, row, column = arguments
        vector, index = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)
        arrays = [
            cgutils.create_struct_proxy(array_type)(context, builder, array)
            for array_type, array in zip(
                (signature.args[0], signature.args[1], signature.args[3]),
                (left, right, out),
                strict=True,
            )
        ]
        left, right, out = arrays
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
        )

        def address(array, row, column):
            width = builder.extract_value(array.shape, 1)
            return builder.gep(array.data, [builder.add(builder.mul(row, width), column)])

        def vector_address(array, row, column):
            return builder.bitcast(address(array, row, column), vector.as_pointer())

        def plus(number, constant):
            return builder.add(number, ir.Constant(index, constant))

        places = [
            (vector_address(out, plus(row, at), plus(column, LANES * part)), at, part)
            for at in range(PANEL_ROWS)
            for part in range(PANEL_VECTORS)
        ]
        sums = [cgutils.alloca_once(builder, vector) for _ in places]
        for (place, _, _), total in zip(places, sums, strict=True):
            builder.store(builder.load(place, align=4), total)
        with cgutils.for_range(builder, depth, intp=index) as loop:
            parts = [
                builder.load(vector_address(right, loop.index, plus(column, LANES * part)), align=4)
                for part in range(PANEL_VECTORS)
            ]
            for (_, at, part), total in zip(places, sums, strict=True):
                if part == 0:
                    number = builder.load(address(left, plus(row, at), loop.index))
                    factor = _broadcast(builder, number, vector)
                product = builder.call(fma, [factor, parts[part], builder.load(total)])
                builder.store(product, total)
        for (place, _, _), total in zip(places, sums, strict=True):
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    return types.void(left, right, types.int64, out, types.int64, types.int64), generate


def _broadcast(builder, number, vector):
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, undefined, places)


def to_float(number):
    """An element of any of the three types as float32."""


@overload(to_float)
def _to_float(number):
    if number == types.float32:
        return lambda number: number
    if number == types.uint16:
        return lambda number: _float_from_bits(np.uint32(number) << np.uint32(16))
    if number == types.int16:
        return lambda number: _float_from_half(number)
    return None


def store(array, row, column, number):
    """array[row, column] = number, rounded to the nearest, ties to even."""


@overload(store)
def _store(array, row, column, number):
    if array.dtype == types.float32:

        def put(array, row, column, number):
            array[row, column] = number

    elif array.dtype == types.uint16:

        def put(array, row, column, number):
            bits = _bits_from_float(number)
            # A NaN's mantissa could round up to the bits of infinity or zero.
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> 16
            array[row, column] = np.uint16(rounded if number == number else 0x7FC0)

    else:

        def put(array, row, column, number):
            array[row, column] = _half_from_float(number)

    return put


@njit(**FAST)
def exp(x):
    """e^x in float32, within 3e-7 of it for |x| < 1 and 4e-6 for |x| < 86, where the rounding of y
    shows; clamped beyond. NaN stays NaN.

    2^y with y = n + f, |f| <= 1/2: n goes into the exponent's bits, 2^f is a Taylor polynomial.
    Written out, since only without a call does the loop around it become vector instructions.
    """
    y = x * np.float32(1.4426950408889634)
    if y < np.float32(-126):
        y = np.float32(-126)
    if y > np.float32(126):
        y = np.float32(126)
    n = np.floor(y + np.float32(0.5))
    f = y - n
    power = np.float32(1.5403530e-4)
    power = power * f + np.float32(1.3333558e-3)
    power = power * f + np.float32(9.6181291e-3)
    power = power * f + np.float32(5.5504109e-2)
    power = power * f + np.float32(2.4022651e-1)
    power = power * f + np.float32(6.9314718e-1)
    power = power * f + np.float32(1)
    exponent = np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)
    return power * _float_from_bits(exponent)
