"""Norms, rotations and the way into the cache on the CPU, compiled by Numba: one pass each."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .numbers import FAST, INLINED, PARALLEL, stay_apart, store, to_float


@njit(**FAST)
def norm_row(x, weight, eps, out):
    """out `[n]` = x / rms(x) * weight; float32; out may be x."""
    squares = np.float32(0)
    for column in range(len(x)):
        squares += x[column] * x[column]
    factor = np.float32(1) / np.sqrt(squares / np.float32(len(x)) + eps)
    for column in range(len(x)):
        out[column] = x[column] * factor * weight[column]


@njit(**FAST)
def rotate_and_store(first, last, qkv, weights, eps, cos, sin, rotations, slots, cache, query):
    """Of tokens [first, last), qkv `[., heads + 2 * kv_heads, D]` → normed and rotated Q in query
    `[., heads, D]`, K and V in their slots `[.]` (negative: nowhere) of cache `[2, blocks,
    kv_heads, block_size, D]`.

    weights `[heads + kv_heads, D]` of the norms of Q and K, which eps < 0 leaves out; cos and sin
    `[., D]` as in Rotation, of which a token has row rotations `[.]`; float32 but for the cache.
    """
    stay_apart()
    heads, kv_heads, block_size = query.shape[1], cache.shape[2], np.int64(cache.shape[3])
    for row in range(first, last):
        at = rotations[row]
        for head in range(heads):
            _rotate(qkv[row, head], weights[head], eps, cos[at], sin[at], query[row, head])
    # A token's key goes to a column of its block, whose cache lines the next tokens' share: those
    # of one head are still near then, those of all heads may be more than the first cache holds.
    for head in range(kv_heads):
        weight = weights[heads + head]
        for row in range(first, last):
            if slots[row] < 0:
                continue
            at, key = rotations[row], qkv[row, heads + head]
            _rotate(key, weight, eps, cos[at], sin[at], key)
            block, offset = divmod(slots[row], block_size)
            store_token(key, qkv[row, heads + kv_heads + head], cache, block, head, offset)


@njit(**INLINED)
def _rotate(source, weight, eps, cos, sin, out):
    """out may be source. Indices are unsigned: of signed ones Numba looks whether they count from
    the end, which keeps LLVM from making vectors."""
    if eps >= 0:
        norm_row(source, weight, eps, source)
    half = np.uint64(len(source) // 2)
    for dim in range(half):
        first, second = source[dim], source[half + dim]
        out[dim] = first * cos[dim] + second * sin[dim]
        out[half + dim] = second * cos[half + dim] + first * sin[half + dim]


@njit(**PARALLEL)
def store_kv(key, value, slots, cache):
    """key and value `[T, kv_heads, D]` to their slots (negative: nowhere)."""
    for token in prange(len(key)):
        if slots[token] >= 0:
            _store_kv(key[token], value[token], slots[token], cache)


@njit(**FAST)
def _store_kv(key, value, slot, cache):
    block, offset = divmod(slot, np.int64(cache.shape[3]))
    for head in range(len(key)):
        store_token(key[head], value[head], cache, block, head, offset)


@njit(**INLINED)
def store_token(key, value, cache, block, head, offset):
    """key and value `[D]`, of one head, to their block: the keys of a block lie transposed."""
    keys = cache[0, block, head].reshape(cache.shape[4], cache.shape[3])
    values = cache[1, block, head]
    for dim in range(len(key)):
        store(keys, dim, offset, to_float(key[dim]))
    for dim in range(len(value)):
        store(values, offset, dim, to_float(value[dim]))
