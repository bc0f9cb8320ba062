"""What stands between the products of a step on the CPU, compiled by Numba.

Each kernel makes one pass over its tokens where plain torch makes one for every operation. Threads
are those of torch's own OpenMP pool.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .cpu_numbers import FAST, PARALLEL, exp, store, to_float


@njit(**PARALLEL)
def add_norm(x, update, has_update, weight, eps, out):
    """x `[T, n]` += update, out = x / rms(x) * weight `[n]`."""
    for token in prange(len(x)):
        _add_norm(token, x, update, has_update, weight, eps, out)


@njit(**FAST)
def _add_norm(token, x, update, has_update, weight, eps, out):
    width = x.shape[1]
    squares = np.float32(0)
    for column in range(width):
        if has_update:
            store(x, token, column, to_float(x[token, column]) + to_float(update[token, column]))
        number = to_float(x[token, column])
        squares += number * number
    factor = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
    for column in range(width):
        number = to_float(x[token, column]) * factor
        store(out, token, column, number * to_float(weight[column]))


@njit(**PARALLEL)
def silu_and_mul(gate_up, out):
    """gate_up `[T, 2n]` → out `[T, n]` = silu(gate) * up."""
    for token in prange(len(out)):
        _silu_and_mul(token, gate_up, out)


@njit(**FAST)
def _silu_and_mul(token, gate_up, out):
    width = out.shape[1]
    for column in range(width):
        gate = to_float(gate_up[token, column])
        up = to_float(gate_up[token, width + column])
        store(out, token, column, gate / (np.float32(1) + exp(-gate)) * up)


@njit(**PARALLEL)
def rotate_and_store(qkv, weights, has_norm, eps, cos, sin, slots, cache, query):
    """qkv `[T, heads + 2 * kv_heads, D]`, weights `[heads + kv_heads, D]` of the norms of Q and K,
    cos and sin `[T, D]` as in Rotation, slots `[T]` (negative: nowhere), cache `[2, blocks,
    kv_heads, block_size, D]` → normed and rotated Q in query `[T, heads, D]`, K and V in the cache.
    """
    for token in prange(len(query)):
        _rotate_and_store(
            qkv[token],
            weights,
            has_norm,
            eps,
            cos[token],
            sin[token],
            slots[token],
            cache,
            query[token],
        )


@njit(**FAST)
def _rotate_and_store(qkv, weights, has_norm, eps, cos, sin, slot, cache, query):
    heads, kv_heads = len(query), cache.shape[2]
    block, offset = divmod(slot, np.int64(cache.shape[3]))
    for head in range(heads):
        _rotate(qkv, weights, head, has_norm, eps, cos, sin, query, head)
    if slot < 0:
        return
    for head in range(kv_heads):
        target = cache[0, block, head]
        _rotate(qkv, weights, heads + head, has_norm, eps, cos, sin, target, offset)
        value, target = qkv[heads + kv_heads + head], cache[1, block, head, offset]
        for dim in range(len(value)):
            target[dim] = value[dim]


@njit(**FAST)
def _rotate(qkv, weights, head, has_norm, eps, cos, sin, target, row):
    source = qkv[head]
    head_dim = len(source)
    half = head_dim // 2
    factor = np.float32(1)
    if has_norm:
        squares = np.float32(0)
        for dim in range(head_dim):
            squares += to_float(source[dim]) * to_float(source[dim])
        factor = np.float32(1) / np.sqrt(squares / np.float32(head_dim) + eps)
    for dim in range(half):
        first, second = to_float(source[dim]), to_float(source[half + dim])
        if has_norm:
            first *= factor * to_float(weights[head, dim])
            second *= factor * to_float(weights[head, half + dim])
        store(target, row, dim, first * to_float(cos[dim]) + second * to_float(sin[dim]))
        dim_2 = half + dim
        store(target, row, dim_2, second * to_float(cos[dim_2]) + first * to_float(sin[dim_2]))


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
        for dim in range(key.shape[1]):
            cache[0, block, head, offset, dim] = key[head, dim]
            cache[1, block, head, offset, dim] = value[head, dim]
