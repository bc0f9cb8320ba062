"""Dot products of bytes in one instruction, or in as few as the processor has.

A vector of LANES int32 sums takes four products in each lane:

    weights   u0 u1 u2 u3 | u4 …      four bytes of a lane: one column of W, four features in a row
    numbers   x0 x1 x2 x3 | x0 …      the same four features of a row of x, in all lanes
    sums    += u0·x0 + u1·x1 + u2·x2 + u3·x3

Weights are unsigned: integers of 4 bits as they are, those of 8 bits plus 128. Numbers are from
-127 to 127. Every path gives exactly these integers: the sums are the same on all processors.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import platform

from llvmlite import ir
from numba.core import cgutils

from ..numbers import FEATURES, LANES
from ..vectors import WORDS

BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)
_SHORTS = ir.VectorType(ir.IntType(16), 2 * LANES)
_BITS = 32 * LANES
ZERO_OF_BYTES = 128
"""The stored byte of an integer of 8 bits that is zero."""


def _choose():
    """Return the name of this processor's path."""
    if platform.machine() in ("aarch64", "arm64"):
        return "sdot" if FEATURES.get("dotprod") else "plain"
    if LANES == 16:
        if FEATURES.get("avx512vnni"):
            return "vnni"
        return "madd" if FEATURES.get("avx512bw") else "plain"
    if FEATURES.get("avxvnni") or (FEATURES.get("avx512vnni") and FEATURES.get("avx512vl")):
        return "vnni"
    return "madd" if FEATURES.get("avx2") else "plain"


PATH = _choose()
"""How this processor multiplies bytes: vnni, madd (vpmaddubsw), sdot (NEON), or plain."""


def begins_at_offset(bits):
    """Return whether a sum of weights of 8 bits has to begin with -128 times the sum of the
    numbers, since `dot` multiplies by the stored bytes. Otherwise `dot` takes 128 off."""
    return bits == 8 and PATH == "vnni"


def dot(builder, sums, weights, numbers, bits):
    """Return sums `[LANES]` int32 plus the products of weights and numbers `[4 * LANES]` bytes,
    four in each lane."""
    if PATH == "vnni":
        return _call(builder, f"llvm.x86.avx512.vpdpbusd.{_BITS}", WORDS, [sums, weights, numbers])
    if bits == 8:
        weights = builder.xor(weights, _bytes(ZERO_OF_BYTES))  # signed: q itself
    if PATH == "sdot":
        return _dot_neon(builder, sums, weights, numbers)
    if PATH == "madd":
        return _dot_madd(builder, sums, weights, numbers, bits)
    return _dot_plain(builder, sums, weights, numbers)


def _dot_madd(builder, sums, weights, numbers, bits):
    """Multiply to pairs of 16 bits, then add two pairs. No pair saturates: 2 · 15 · 127 and
    2 · 128 · 127 are less than 2^15. For 8 bits the weight's sign goes to the number, since one
    factor has to be unsigned: |q| · (sign(q) · x)."""
    if bits == 8:
        negative = builder.icmp_signed("<", weights, _bytes(0))
        numbers = builder.select(negative, builder.sub(_bytes(0), numbers), numbers)
        weights = builder.select(negative, builder.sub(_bytes(0), weights), weights)
    name = {512: "avx512.pmaddubs.w.512", 256: "avx2.pmadd.ub.sw"}[_BITS]
    pairs = _call(builder, f"llvm.x86.{name}", _SHORTS, [weights, numbers])
    ones = ir.Constant(_SHORTS, [1] * (2 * LANES))
    name = {512: "avx512.pmaddw.d.512", 256: "avx2.pmadd.wd"}[_BITS]
    return builder.add(sums, _call(builder, f"llvm.x86.{name}", WORDS, [pairs, ones]))


def _dot_neon(builder, sums, weights, numbers):
    """Multiply 16 signed bytes an instruction: LANES is 8 here, two of NEON's vectors."""
    halves = []
    for begin in range(0, LANES, 4):
        lanes, octets = _mask(range(begin, begin + 4)), _mask(range(4 * begin, 4 * begin + 16))
        parts = [builder.shuffle_vector(sums, sums, lanes)]
        parts += [builder.shuffle_vector(each, each, octets) for each in (weights, numbers)]
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        halves.append(_call(builder, name, parts[0].type, parts))
    return builder.shuffle_vector(*halves, _mask(range(LANES)))


def _dot_plain(builder, sums, weights, numbers):
    """Multiply in int32, byte by byte of each lane."""
    for byte in range(4):
        every_fourth = _mask(range(byte, 4 * LANES, 4))
        left, right = (
            builder.sext(builder.shuffle_vector(each, each, every_fourth), WORDS)
            for each in (weights, numbers)
        )
        sums = builder.add(sums, builder.mul(left, right))
    return sums


def _call(builder, name, result, arguments):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _bytes(number):
    """Return a constant vector of bytes."""
    return ir.Constant(BYTES, [number] * (4 * LANES))


def _mask(lanes):
    """Return the mask of a shuffle."""
    places = list(lanes)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
