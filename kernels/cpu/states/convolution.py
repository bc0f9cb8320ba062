"""The short causal convolution (Mamba, arXiv 2312.00752) over packed rows, each with its state.

    out[t, c] = bias[c] + Σ_j weight[c, j] · x[t − (K − 1) + j, c]

An item is a row and a block of channels. Channels are next to each other in x, in the transposed
weight and in the states, so that all loops over them become vector instructions.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ..kernel import kernel
from ..numbers import FAST
from ..region import launch

CHANNELS = 128
"""Channels of an item."""


class Convolution(NamedTuple):
    """The work of `convolve`."""

    x: Any
    """`[T, channels]` float32."""
    weight: Any
    """`[K, channels]` float32: transposed."""
    bias: Any
    """`[channels]` float32."""
    states: Any
    """`[num_slots, K − 1, channels]` float32: the last inputs, oldest first."""
    slots: Any
    """`[rows]` int32; negative: the row gets zeros."""
    saves: Any
    """`[T]` int32: the slot that gets the state after a token; negative: none."""
    loc: Any
    """`[rows + 1]` int32: the first token of each row."""
    seq_lens: Any
    """`[rows]` int32: a row as long as its sequence begins from zeros."""
    sums: Any
    """Scratch `[threads, CHANNELS]` float32."""
    out: Any
    """Like x."""


@kernel
def convolve(item, layer, rows, thread, work):
    """Convolve a block of channels of one row."""
    x, weight, bias, out, sums = work.x, work.weight, work.bias, work.out, work.sums[thread]
    saves, blocks = work.saves, (x.shape[1] + CHANNELS - 1) // CHANNELS
    row, block = item // blocks, item % blocks
    first = np.uint64(block * CHANNELS)
    width = np.uint64(min(CHANNELS, x.shape[1] - block * CHANNELS))
    slot, begin, end = work.slots[row], work.loc[row], work.loc[row + 1]
    if slot < 0:
        for token in range(begin, end):
            _fill(out, token, first, width)
        return
    state, taps = work.states[slot], len(weight) - 1
    if work.seq_lens[row] == end - begin:
        for tap in range(taps):
            _clear(state[tap], first, width)
    for token in range(begin, end):
        # 1. The sum over the last K inputs, of which the state has those before the row.
        _copy(bias, sums, first, width)
        for tap in range(taps + 1):
            source = token - taps + tap
            if source >= begin:
                _add(x[source], weight[tap], sums, first, width)
            else:
                _add(state[taps + source - begin], weight[tap], sums, first, width)
        _put(sums, out, token, first, width)
        # 2. A snapshot of the state as it is after this token.
        if saves[token] >= 0:
            _shift(x, state, begin, token + 1, work.states[saves[token]], first, width)
    # 3. The last inputs. An older line of the state is read before it is overwritten.
    _shift(x, state, begin, end, state, first, width)


# Functions of their own: within the kernel's loops LLVM would not vectorise these.


@njit(**FAST)
def _shift(x, state, begin, end, target, first, width):
    """Write the last inputs before token `end` to a target, oldest first; it may be the state."""
    taps = len(state)
    for tap in range(taps):
        source = end - taps + tap
        if source >= begin:
            _take(x[source], target[tap], first, width)
        else:
            _take(state[taps + source - begin], target[tap], first, width)


@njit(**FAST)
def _take(line, target, first, width):
    for channel in range(width):
        target[first + channel] = line[first + channel]


@njit(**FAST)
def _add(line, weight, sums, first, width):
    for channel in range(width):
        sums[channel] += line[first + channel] * weight[first + channel]


@njit(**FAST)
def _copy(source, target, first, width):
    for channel in range(width):
        target[channel] = source[first + channel]


@njit(**FAST)
def _clear(line, first, width):
    for channel in range(width):
        line[first + channel] = np.float32(0)


@njit(**FAST)
def _put(sums, out, token, first, width):
    for channel in range(width):
        out[token, first + channel] = sums[channel]


@njit(**FAST)
def _fill(out, token, first, width):
    for channel in range(width):
        out[token, first + channel] = np.float32(0)


def causal_conv(work: Convolution, num_threads: int) -> None:
    """Run `convolve` over all rows."""
    blocks = -(-work.x.shape[1] // CHANNELS)
    rows = len(work.loc) - 1
    launch(convolve, work, rows * blocks, rows, num_threads)
