"""Linear attention with a decay over packed rows, each with its state S `[key_dim, value_dim]`.

    S ← decay_t · S
    S ← S + k_tᵀ v_t                          Mamba-2 (arXiv 2405.21060), with k = B and q = C
    S ← S + k_tᵀ beta_t (v_t − k_t S)         the gated delta rule (arXiv 2412.06464)
    out_t = scale · q_t S

Columns of S know nothing of each other. An item is a row, a head and a block of columns, which
stays in the first-level cache while the row's tokens pass.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ..kernel import kernel
from ..norms import _sum_of_squares
from ..numbers import FAST
from ..region import launch

COLUMNS = 32
"""Columns of the state of an item."""
L2_EPSILON = np.float32(1e-6)
"""Added to the sum of squares of a key or query before its square root divides it."""


class Recurrence(NamedTuple):
    """The work of `recur`."""

    query: Any
    """`[T, key_heads, key_dim]` float32."""
    key: Any
    value: Any
    """`[T, heads, value_dim]` float32."""
    decay: Any
    """`[T, heads]` float32: factors."""
    beta: Any
    """Like decay; empty: no delta rule."""
    states: Any
    """`[num_slots, heads, key_dim, value_dim]` float32."""
    slots: Any
    """This and the next three are as in `Convolution`."""
    saves: Any
    loc: Any
    seq_lens: Any
    lines: Any
    """Scratch `[threads, 3, key_dim or COLUMNS]` float32: the key, the query, and sums."""
    out: Any
    """Like value."""
    scale: Any
    """float32."""
    normalises: bool
    """Whether keys and queries are divided by their length."""


@kernel
def recur(item, layer, rows, thread, work):
    """Pass the tokens of one row through a block of columns of one head's state."""
    query, key, value, out, lines = work.query, work.key, work.value, work.out, work.lines[thread]
    decay, beta, saves, scale = work.decay, work.beta, work.saves, work.scale
    normalises, one = work.normalises, np.float32(1)
    heads, columns = value.shape[1], value.shape[2]
    blocks = (columns + COLUMNS - 1) // COLUMNS
    row, head, block = item // (heads * blocks), item // blocks % heads, item % blocks
    first = np.uint64(block * COLUMNS)
    width = np.uint64(min(COLUMNS, columns - block * COLUMNS))
    slot, begin, end = work.slots[row], work.loc[row], work.loc[row + 1]
    if slot < 0:
        for token in range(begin, end):
            _fill(out[token], head, first, width)
        return
    state, depth = work.states[slot, head], np.uint64(key.shape[2])
    key_line, query_line, sums = lines[0], lines[1], lines[2]
    key_head = head // (heads // key.shape[1])
    if work.seq_lens[row] == end - begin:
        _clear(state, first, width)
    for token in range(begin, end):
        _read(key[token, key_head], key_line, depth, one, normalises)
        _read(query[token, key_head], query_line, depth, scale, normalises)
        # 1. What is written: the value, or its difference from what the decayed state says.
        if len(beta) > 0:
            _recall(state, key_line, depth, decay[token, head], sums, first, width)
            _correct(value[token, head], beta[token, head], sums, first, width)
            _write(state, key_line, depth, one, sums, first, width)
        else:
            _take(value[token, head], sums, first, width)
            _write(state, key_line, depth, decay[token, head], sums, first, width)
        # 2. What is read.
        _ask(state, query_line, depth, sums, first, width)
        _put(sums, out[token], head, first, width)
        if saves[token] >= 0:
            _copy(state, work.states[saves[token], head], first, width)


# Functions of their own: within the kernel's loops LLVM would not vectorise these.


@njit(**FAST)
def _read(source, line, depth, scale, normalises):
    """Read a key or a query, with the length `scale` if it is normalised."""
    for dim in range(depth):
        line[dim] = source[dim]
    if normalises:
        scale = scale / np.sqrt(_sum_of_squares(line[:depth]) + L2_EPSILON)
    for dim in range(depth):
        line[dim] *= scale


@njit(**FAST)
def _recall(state, key, depth, decay, sums, first, width):
    """Decay the state, and compute sums = k S."""
    for column in range(width):
        sums[column] = np.float32(0)
    for dim in range(depth):
        line, factor = state[dim], key[dim]
        for column in range(width):
            number = line[first + column] * decay
            line[first + column] = number
            sums[column] += number * factor


@njit(**FAST)
def _correct(value, beta, sums, first, width):
    for column in range(width):
        sums[column] = (value[first + column] - sums[column]) * beta


@njit(**FAST)
def _take(value, sums, first, width):
    for column in range(width):
        sums[column] = value[first + column]


@njit(**FAST)
def _write(state, key, depth, decay, sums, first, width):
    """Compute S ← decay · S + kᵀ sums."""
    for dim in range(depth):
        line, factor = state[dim], key[dim]
        for column in range(width):
            line[first + column] = line[first + column] * decay + factor * sums[column]


@njit(**FAST)
def _ask(state, query, depth, sums, first, width):
    """Compute sums = q S."""
    for column in range(width):
        sums[column] = np.float32(0)
    for dim in range(depth):
        line, factor = state[dim], query[dim]
        for column in range(width):
            sums[column] += line[first + column] * factor


@njit(**FAST)
def _copy(state, target, first, width):
    for dim in range(len(state)):
        for column in range(width):
            target[dim, first + column] = state[dim, first + column]


@njit(**FAST)
def _clear(state, first, width):
    for dim in range(len(state)):
        for column in range(width):
            state[dim, first + column] = np.float32(0)


@njit(**FAST)
def _put(sums, out, head, first, width):
    for column in range(width):
        out[head, first + column] = sums[column]


@njit(**FAST)
def _fill(out, head, first, width):
    for column in range(width):
        out[head, first + column] = np.float32(0)


def gated_recurrence(work: Recurrence, num_threads: int) -> None:
    """Run `recur` over all rows."""
    _, heads, columns = work.value.shape
    rows = len(work.loc) - 1
    items = rows * heads * -(-columns // COLUMNS)
    launch(recur, work, items, rows, num_threads)
