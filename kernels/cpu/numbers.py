"""Numbers as Numba's kernels read and write them: three float types, and a fast exponential.

NumPy knows no bfloat16, and Numba no half floats on the CPU. So arrays of them travel as their
bits, bfloat16 as uint16 and float16 as int16 (`arrays.as_array`), and all arithmetic is in float32.

Importing this module sets Numba's options; every module that compiles something imports it first.
It does without torch, which a process that only compiles need not wait for.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import hashlib
from pathlib import Path

import numba
import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from ..cache_folder import cache_folder

# Numba compiles a cached function again if the function's own file has changed, but not if a file
# has changed whose functions it calls. So the cache is kept by all that the machine code depends
# on: the sources of this folder, Numba's release, the processor.
_HERE = Path(__file__).parent
FEATURES: dict[str, bool] = dict(binding.get_host_cpu_features())
"""What the processor has, by LLVM's names; NUMBA_CPU_FEATURES may say less."""
if numba.config.CPU_FEATURES is not None:
    FEATURES = {name[1:]: name[0] == "+" for name in numba.config.CPU_FEATURES.split(",")}
_NAME = numba.config.CPU_NAME or binding.get_host_cpu_name()
_PARTS = (numba.__version__, _NAME, str(sorted(FEATURES.items())))
_SOURCES = [path.read_bytes() for path in sorted(_HERE.rglob("*.py"))]
_DIGEST = hashlib.sha256(b"".join((*_SOURCES, *map(str.encode, _PARTS)))).hexdigest()[:16]
CACHE = cache_folder(f"numba-{_DIGEST}", numba.config.CACHE_DIR, _HERE)
numba.config.CACHE_DIR = str(CACHE)

# The first one is torch's own pool of threads, if the system has GNU's OpenMP. Numba sets its size
# when it first uses it (see `arrays.py`).
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

# A product and a sum may be fused, but nothing is reordered: LLVM makes several loops of one, for
# what fills a vector, for what is left over and for arrays that are near to each other, and where
# it may choose the order of two factors it has chosen another one in each. Nothing is assumed
# about NaN and infinity: a NaN in a sequence's cache must come out as one.
# Division by zero does not raise, which would keep loops from becoming vector instructions.
FAST = {
    "fastmath": {"contract", "nsz"},
    "error_model": "numpy",
    "nogil": True,
    "cache": True,
}

# For an overload, which has no cache of its own.
FAST_CALLS = {name: FAST[name] for name in ("fastmath", "error_model", "nogil")}

# For a function that does nothing but sum up: the sum is split into as many as a vector has lanes,
# in a way that depends on how many numbers there are, and on nothing else.
SUM = {**FAST, "fastmath": {"reassoc", "contract", "nsz"}}

# For a function that is only compiled as part of its callers.
INLINED = {**FAST, "inline": "always"}

# Only loops over prange become parallel. Their bodies are functions of their own, which Numba's
# analysis of parallel code, slow on long ones, does not look into.
_OTHERS = ["comprehension", "fusion", "inplace_binop", "numpy", "reduction", "setitem", "stencil"]
PARALLEL = {**FAST, "parallel": {"prange": True} | dict.fromkeys(_OTHERS, False)}

LANES = 16 if FEATURES.get("avx512f") else 8
CACHE_LINE = 64
"""Bytes of a cache line."""


@intrinsic
def float_from_bits(typing_context, bits):
    """Return the float32 that has these bits, a uint32."""

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
def fetch_add(typing_context, counters, index, amount):
    """Add to `counters[index]` (int64) atomically and return the number before that. A thread that
    reads the sum with `load` sees everything that this one wrote before."""

    def generate(context, builder, signature, arguments):
        place = _counter(context, builder, signature, arguments)
        return builder.atomic_rmw("add", place, arguments[2], "acq_rel")

    return types.int64(counters, types.int64, types.int64), generate


@intrinsic
def load(typing_context, counters, index):
    """Return `counters[index]` (int64) as other threads have left it."""

    def generate(context, builder, signature, arguments):
        place = _counter(context, builder, signature, arguments)
        return builder.load_atomic(place, "acquire", align=8)

    return types.int64(counters, types.int64), generate


@intrinsic
def prefetch(typing_context, numbers, at):
    """Fetch the cache line of an element, whose index is in memory order, ahead of its use."""

    def generate(context, builder, signature, arguments):
        array = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
        integer, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, integer, integer, integer])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), pointer)
        # For reading (0), kept in the second-level cache (2), as data (1).
        builder.call(function, [place, *(ir.Constant(integer, number) for number in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(numbers, types.int64), generate


def _counter(context, builder, signature, arguments):
    array = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@intrinsic
def yield_core(typing_context):
    """Let another thread that waits for this core have it (sched_yield)."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def load_scale(typing_context, octets, at):
    """Return the float32 that begins at an element of an int8 array, whose index is in memory
    order."""

    def generate(context, builder, signature, arguments):
        array = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(array.data, [arguments[1]])
        return builder.load(builder.bitcast(place, ir.FloatType().as_pointer()), align=1)

    return types.float32(octets, types.int64), generate


@intrinsic
def store_scale(typing_context, octets, at, number):
    """Write a float32 to where `load_scale` reads it."""

    def generate(context, builder, signature, arguments):
        array = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(array.data, [arguments[1]])
        builder.store(arguments[2], builder.bitcast(place, ir.FloatType().as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(octets, types.int64, types.float32), generate


def to_float(number):
    """Return an element of any of the types as float32."""


@overload(to_float)
def _to_float(number):
    if number == types.float32:
        return lambda number: number
    if number == types.uint16:
        return lambda number: float_from_bits(np.uint32(number) << np.uint32(16))
    if number == types.int16:
        return lambda number: _float_from_half(number)
    if number == types.int8:
        return lambda number: np.float32(number)
    return None


def store(array, row, column, number):
    """Set array[row, column] to a float32 number, rounded to the nearest, ties to even."""


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


LOG2_E = np.float32(1.4426950408889634)
EXP_TERMS = tuple(
    np.float32(term)
    for term in (
        1.5403530e-4,
        1.3333558e-3,
        9.6181291e-3,
        5.5504109e-2,
        2.4022651e-1,
        6.9314718e-1,
        1,
    )
)
"""The coefficients of 2^f's Taylor polynomial, the highest power first."""


@njit(**FAST)
def exp(x):
    """Return e^x in float32, with a relative error of at most 3e-7 for |x| < 1 and 4e-6 for
    |x| < 86, where the rounding of y shows; clamped beyond. NaN stays NaN.

    It is 2^y with y = n + f, |f| <= 1/2: n goes into the exponent's bits, 2^f is a Taylor
    polynomial. It is written out because a loop with a call in it is not vectorised.
    """
    y = x * LOG2_E
    if y < np.float32(-126):
        y = np.float32(-126)
    if y > np.float32(126):
        y = np.float32(126)
    n = np.int32(np.int32(y + np.float32(126.5)) - np.int32(126))
    f = y - np.float32(n)
    power = EXP_TERMS[0]
    power = power * f + EXP_TERMS[1]
    power = power * f + EXP_TERMS[2]
    power = power * f + EXP_TERMS[3]
    power = power * f + EXP_TERMS[4]
    power = power * f + EXP_TERMS[5]
    power = power * f + EXP_TERMS[6]
    return power * float_from_bits(np.uint32(n + np.int32(127)) << np.uint32(23))
