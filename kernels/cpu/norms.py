"""Embeddings, norms, rotations, and the writing of K and V to the cache on the CPU.

RMSNorm is arXiv 1910.07467, RoPE arXiv 2104.09864 in the "half" order of transformers' models.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from .kernel import kernel
from .numbers import FAST, FAST_CALLS, INLINED, SUM, store, store_scale, to_float
from .region import launch

FEW = 32
"""Rows per item of the kernels that compute no product. At least as many tokens share the cache
lines of their transposed keys."""


class Norm(NamedTuple):
    """An RMSNorm of rows, for each of a number of layers; before it, an update may be normed and
    added to the rows."""

    x: Any
    """`[., hidden_size]` float32."""
    weights: Any
    """`[layers, hidden_size]` float32."""
    epsilons: Any
    """`[layers]` float32; negative if the layer has no norm: then out is x."""
    out: Any
    """Like x."""
    updates: Any
    """Like x, overwritten; it may be `out`. Empty if there are none."""
    update_weights: Any
    """`[layers, hidden_size]` float32."""
    update_epsilons: Any
    """`[layers]` float32."""
    input_ids: Any
    """`[rows]`: layer 0 first fetches x from the embedding. Empty if it does not."""
    embedding: Any
    """`[vocab_size, hidden_size]`."""
    scale: Any
    """The factor of what is fetched, float32."""


class Heads(NamedTuple):
    """Q, K and V of the tokens, on their way to attention and into the cache."""

    qkv: Any
    """`[., heads + 2 * kv_heads, head_dim]` float32; K is overwritten."""
    weights: Any
    """Weights of the norms of Q and K, `[layers, heads + kv_heads, head_dim]` float32."""
    epsilons: Any
    """`[layers]` float32; negative if Q and K have no norms."""
    cos: Any
    """`[., n]` float32, as in Rotation: the first n elements of each head rotate."""
    sin: Any
    rotates: Any
    """`[layers]`: 0 if a layer rotates nothing, else 1."""
    rotations: Any
    """The row of cos and sin of each token, `[.]`, for kind 0."""
    kinds: Any
    """`[layers]`: the kind of each layer's rotations."""
    kind_rows: int
    """Rows of cos and sin from one kind to the next."""
    norms_all_heads: bool
    """Whether all heads of Q have one norm, and all of K, not each head."""
    rotates_pairs: bool
    """Whether elements 2i and 2i + 1 rotate, not i and i + n / 2."""
    slots: Any
    """The cache slot of each token, `[groups, .]`; negative: K and V are not stored."""
    cache: Any
    """`[places, 2, blocks, kv_heads, block_size, head_dim]`; of int8 head_dim + 4, for the steps
    that `_store_rounded` writes."""
    layer_places: Any
    """`[layers, 2]` int64: the group of a layer, which has slots of its own, and its place in the
    cache."""
    query: Any
    """The rotated Q (out), `[., heads, head_dim]` float32."""


class Pick(NamedTuple):
    """A choice of rows."""

    rows: Any
    picks: Any
    """Which rows, `[.]`."""
    out: Any


class Move(NamedTuple):
    """A choice of rows that move to the front of two arrays, in place."""

    x: Any
    attended: Any
    picks: Any
    """Which rows, `[.]`, ascending."""


class KeyValues(NamedTuple):
    """K and V to be stored as they are."""

    key: Any
    """`[T, kv_heads, head_dim]`."""
    value: Any
    slots: Any
    """`[T]`; negative: not stored."""
    cache: Any
    """One layer's `[2, blocks, kv_heads, block_size, head_dim]`."""


@kernel
def normalise(item, layer, rows, thread, norm):
    """Compute out = x / rms(x) * weight for an item's rows."""
    x, out, weight, eps = norm.x, norm.out, norm.weights[layer], norm.epsilons[layer]
    input_ids, embedding, scale = norm.input_ids, norm.embedding, norm.scale
    updates, update_weights, update_epsilons = (
        norm.updates,
        norm.update_weights,
        norm.update_epsilons,
    )
    embeds = layer == 0 and len(input_ids) > 0
    adds = len(updates) > 0 and not embeds
    for row in range(item * FEW, min(item * FEW + FEW, rows)):
        if embeds:
            line = embedding[input_ids[row]]
            for dim in range(len(line)):
                x[row, dim] = to_float(line[dim]) * scale
        if adds:
            update = updates[row]
            norm_row(update, update_weights[layer], update_epsilons[layer], update)
            _add_row(update, x[row])
        if eps >= 0:
            norm_row(x[row], weight, eps, out[row])
        else:
            copy_row(x[row], out[row])


@kernel
def rotate(item, layer, rows, thread, heads):
    """Norm and rotate Q and K of an item's tokens: Q into `query`, K and V into the cache."""
    group, place = heads.layer_places[layer, 0], heads.layer_places[layer, 1]
    qkv, query, cache = heads.qkv, heads.query, heads.cache[place]
    weights, eps = heads.weights[layer], heads.epsilons[layer]
    cos, sin, rotations, slots = heads.cos, heads.sin, heads.rotations, heads.slots[group]
    first_of_kind, pairs = heads.kinds[layer] * heads.kind_rows, heads.rotates_pairs
    num_heads, kv_heads, block_size = query.shape[1], cache.shape[2], np.int64(cache.shape[3])
    half = np.uint64(cos.shape[1] // 2 * heads.rotates[layer])
    first, last = item * FEW, min(item * FEW + FEW, rows)
    # 1. Q and K. They are next to each other.
    if heads.norms_all_heads:
        width = num_heads * qkv.shape[2]
        end, flat = width + kv_heads * qkv.shape[2], weights.reshape(weights.size)
        for row in range(first, last):
            line = qkv[row].reshape(qkv.shape[1] * qkv.shape[2])
            norm_row(line[:width], flat[:width], eps, line[:width])
            norm_row(line[width:end], flat[width:end], eps, line[width:end])
        eps = np.float32(-1)
    for row in range(first, last):
        at = rotations[row] + first_of_kind
        for head in range(num_heads + kv_heads):
            part = qkv[row, head]
            out = query[row, head] if head < num_heads else part
            if eps >= 0:
                norm_row(part, weights[head], eps, part)
            if pairs:
                _rotate_pairs(part, cos[at], sin[at], half, out)
            else:
                _rotate(part, cos[at], sin[at], half, out)
    # 2. K and V into the cache, head by head. A token's key is a column of its block, whose cache
    #    lines the keys of the next tokens share: those of one head are still near then, those of
    #    all heads may be more than the first-level cache holds.
    for head in range(kv_heads):
        for row in range(first, last):
            if slots[row] >= 0:
                key, value = qkv[row, num_heads + head], qkv[row, num_heads + kv_heads + head]
                block, offset = divmod(slots[row], block_size)
                _store_token(key, value, cache, block, head, offset)


@kernel
def pick(item, layer, rows, thread, choice):
    """Copy an item's rows of the choice to `out`."""
    source, picks, out = choice.rows, choice.picks, choice.out
    for row in range(item * FEW, min(item * FEW + FEW, rows)):
        line = source[picks[row]]
        for dim in range(len(line)):
            out[row, dim] = line[dim]


@kernel
def move(item, layer, rows, thread, choice):
    """Move the rows of the choice to the front: of x (item 0), or of `attended` (item 1)."""
    picks = choice.picks
    target = choice.x if item == 0 else choice.attended
    for row in range(rows):
        copy_row(target[picks[row]], target[row])


@kernel
def store_token(item, layer, rows, thread, tokens):
    """Store K and V of token `item`."""
    key, value, slot, cache = tokens.key, tokens.value, tokens.slots[item], tokens.cache
    if slot >= 0:
        block, offset = divmod(slot, np.int64(cache.shape[3]))
        for head in range(key.shape[1]):
            _store_token(key[item, head], value[item, head], cache, block, head, offset)


def store_kv(
    key: np.ndarray[Any, Any],
    value: np.ndarray[Any, Any],
    slots: np.ndarray[Any, Any],
    cache: np.ndarray[Any, Any],
    num_threads: int,
) -> None:
    """Store key and value `[T, kv_heads, D]` in their slots (negative: nowhere)."""
    launch(store_token, KeyValues(key, value, slots, cache), len(key), len(key), num_threads)


@njit(**FAST)
def norm_row(x, weight, eps, out):
    """Compute out `[n]` = x / rms(x) * weight; float32; out may be x."""
    factor = np.float32(1) / np.sqrt(_sum_of_squares(x) / np.float32(len(x)) + eps)
    for column in range(len(x)):
        out[column] = x[column] * factor * weight[column]


@njit(**SUM)
def _sum_of_squares(x):
    squares = np.float32(0)
    for column in range(len(x)):
        squares += x[column] * x[column]
    return squares


@njit(**FAST)
def _add_row(update, x):
    """Add `update` to x `[n]`; float32."""
    for column in range(len(x)):
        x[column] += update[column]


@njit(**FAST)
def copy_row(x, out):
    """Copy x `[n]` to out."""
    for column in range(len(x)):
        out[column] = x[column]


@njit(**INLINED)
def _rotate(source, cos, sin, half, out):
    """Rotate the first 2 · half elements of one head; out may be source. Indices are unsigned: for
    signed ones Numba generates a test whether they count from the end, which keeps LLVM from
    vectorising the loop."""
    for dim in range(half):
        first, second = source[dim], source[half + dim]
        out[dim] = first * cos[dim] + second * sin[dim]
        out[half + dim] = second * cos[half + dim] + first * sin[half + dim]
    for dim in range(half + half, np.uint64(len(source))):
        out[dim] = source[dim]


@njit(**INLINED)
def _rotate_pairs(source, cos, sin, half, out):
    """Rotate the first 2 · half elements of one head, each with its neighbour; see `_rotate`."""
    for dim in range(half):
        first, second = source[dim + dim], source[dim + dim + np.uint64(1)]
        out[dim + dim] = first * cos[dim] + second * sin[dim]
        out[dim + dim + np.uint64(1)] = second * cos[half + dim] + first * sin[half + dim]
    for dim in range(half + half, np.uint64(len(source))):
        out[dim] = source[dim]


def _store_token(key, value, cache, block, head, offset):
    """Store key and value `[D]` of one head in their block, whose keys are transposed."""


@overload(_store_token, jit_options=FAST_CALLS)
def _store_token_of(key, value, cache, block, head, offset):
    if cache.dtype == types.int8:
        return _store_rounded
    return _store_floats


def _store_floats(key, value, cache, block, head, offset):
    keys = cache[0, block, head].reshape(cache.shape[4], cache.shape[3])
    values = cache[1, block, head]
    for dim in range(len(key)):
        store(keys, dim, offset, to_float(key[dim]))
    for dim in range(len(value)):
        store(values, offset, dim, to_float(value[dim]))


def _store_rounded(key, value, cache, block, head, offset):
    """Store 127ths of the greatest number of key and of value, and that as float32 after them: in
    a cache of int8 there are four more bytes a token. Those of the keys make four more rows of
    `block_size`, those of a value follow it."""
    keys = cache[0, block, head].reshape(cache.shape[4], cache.shape[3])
    values = cache[1, block, head]
    scale, factor = _step_of(key)
    for dim in range(len(key)):
        keys[dim, offset] = np.int8(np.rint(to_float(key[dim]) * factor))
    store_scale(keys, np.int64(len(key) * keys.shape[1] + 4 * offset), scale)
    scale, factor = _step_of(value)
    for dim in range(len(value)):
        values[offset, dim] = np.int8(np.rint(to_float(value[dim]) * factor))
    store_scale(values, np.int64(offset * values.shape[1] + len(value)), scale)


@njit(**INLINED)
def _step_of(line):
    """Return a line's step, and the factor that makes integers of it: its greatest number becomes
    127. A NaN or an infinity becomes the step; so does nothing below 1e-30, which is 0."""
    greatest = np.float32(0)
    for dim in range(len(line)):
        number = abs(to_float(line[dim]))
        if not number <= greatest:  # or NaN
            greatest = number
            if number != number:
                break
    if greatest < np.float32(1e-30):
        return np.float32(0), np.float32(0)
    if not greatest < np.float32(np.inf):
        return greatest, np.float32(0)
    return greatest / np.float32(127), np.float32(127) / greatest
