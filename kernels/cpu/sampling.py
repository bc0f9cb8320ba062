"""A draw from a row's tokens on the CPU in one pass: the race of `engine.sampling.sampler`.

The winner of a row is argmax of p / E, p being a token's weight and E an exponential draw of its
own. Most tokens lose without a logarithm: E = -log(1 - u) is at least u, so that a token of weight
p can only beat the best quotient s so far if u s < p.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numba import njit

from .kernel import Kernel, Signature, kernel, signature_of
from .numbers import FAST, INLINED, exp, float_from_bits
from .region import launch

_CHUNK = 256
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_MASK = np.uint64(2**63 - 1)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_UNIT = np.float32((1.0 - 2.0**-24) * 2.0**-63)

_NO_POSITIONS = np.zeros(1, dtype=np.int64)


class Draw(NamedTuple):
    """Draws from rows of logits, one for each of G."""

    logits: Any
    """`[W, N]` float32."""
    rows: Any
    """The row of the logits of each draw, `[G]`."""
    tops: Any
    """The maxima of the rows, `[W]`."""
    temperatures: Any
    """`[G, 1]`."""
    seeds: Any
    """`[G]`; if not is_seeded, the random streams' keys themselves."""
    positions: Any
    """`[R]`."""
    batch_rows: Any
    """Which of the positions each draw has, `[G]`."""
    is_seeded: bool
    token_ids: Any
    """`[1, N]` or `[G, N]`."""
    winners: Any
    """`[G]` (out): indices into N, 0 if all tokens weigh nothing."""
    scratch: Any
    """`[threads, 2, _CHUNK]` float32."""


class Best(NamedTuple):
    """The best tokens of rows of logits."""

    logits: Any
    """`[., N]` float32."""
    bits: Any
    """The same memory as int32."""
    values: Any
    """The maxima (out), `[.]` float32; NaN if the row is not finite."""
    token_ids: Any
    """The first tokens that have them (out), `[.]`; 0 if the row is not finite."""
    finite: Any
    """Whether the row is finite (out), `[.]` bool: no NaN and no infinity is in it, but for -inf
    beside a finite number."""


Array = np.ndarray[Any, Any]


def race(relative: Array, keys: Array, token_ids: Array, winners: Array) -> None:
    """Draw winners `[R]`: argmax over N of exp(relative `[R, N]`) / E, where E is
    `counter_rng.exponential(keys [R], token_ids)`, token_ids `[1, N]` or `[R, N]`; 0 if all tokens
    weigh nothing."""
    count = len(relative)
    rows, tops = np.arange(count), np.zeros(count, dtype=np.float32)
    ones = np.ones((count, 1), dtype=np.float32)
    _launch(relative, rows, tops, ones, keys, _NO_POSITIONS, rows, False, token_ids, winners)


def draw(
    logits: Array,
    rows: Array,
    tops: Array,
    temperatures: Array,
    seeds: Array,
    positions: Array,
    batch_rows: Array,
    token_ids: Array,
    winners: Array,
) -> None:
    """Draw winners `[G]` of the race over rows `[G]` of logits `[W, N]`, whose maxima are tops
    `[W]`: relative is (logits - top) / temperatures `[G, 1]`. The keys are those that
    `counter_rng.stream_keys` makes of seeds `[G]` and positions `[R]`[batch_rows `[G]`]."""
    arrays = (logits, rows, tops, temperatures, seeds, positions, batch_rows)
    _launch(*arrays, True, token_ids, winners)


def draw_task() -> tuple[Kernel, Signature]:
    """Return the kernel, and what it is compiled for."""
    words, floats = (np.zeros(1, dtype=dtype) for dtype in (np.int64, np.float32))
    lines, tokens = floats[None], words[None]
    example = Draw(
        lines, words, floats, lines, words, words, words, True, tokens, words, lines[None]
    )
    return run_race, signature_of(example)


def _launch(*work: Any) -> None:
    num_threads = numba.get_num_threads()
    scratch = np.empty((num_threads, 2, _CHUNK), dtype=np.float32)
    draws = Draw._make([*map(_contiguous, work), scratch])
    launch(run_race, draws, len(draws.winners), 0, num_threads)


def _contiguous(value: Any) -> Any:
    return np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value


@kernel
def run_race(item, layer, rows, thread, draws):
    """Draw number `item`."""
    row = draws.rows[item]
    logits, top = draws.logits[row], draws.tops[row]
    inverse = np.float32(1) / draws.temperatures[item, 0]
    token_ids = draws.token_ids[item % len(draws.token_ids)]
    weights, uniforms = draws.scratch[thread, 0], draws.scratch[thread, 1]
    key = np.uint64(draws.seeds[item])
    if draws.is_seeded:
        key = _stream_key(key, np.uint64(draws.positions[draws.batch_rows[item]]))
    winner, best = np.int64(0), np.float32(0)
    for begin in range(0, len(logits), _CHUNK):
        # 1. Weights and uniform numbers of a chunk.
        start = np.uint64(begin)
        count = min(np.uint64(_CHUNK), np.uint64(len(logits)) - start)
        for index in range(count):
            logit = (logits[start + index] - top) * inverse
            weights[index] = exp(logit) if logit > np.float32(-87) else np.float32(0)
            uniforms[index] = _uniform(key, token_ids[start + index])
        # 2. How many tokens may win? In most chunks none. They are counted without a branch, so
        #    that the loop becomes vector instructions.
        hopeful = np.int32(0)
        for index in range(count):
            hopeful += np.int32(uniforms[index] * best < weights[index])
        if hopeful == 0:
            continue
        # 3. The logarithm, for those tokens only.
        for index in range(count):
            weight, uniform = weights[index], uniforms[index]
            if uniform * best < weight:
                quotient = weight / -np.log1p(-uniform)
                if quotient > best:
                    winner, best = np.int64(start + index), quotient
    draws.winners[item] = winner


@kernel
def find_best(item, layer, rows, thread, best):
    """Find the best token of row `item`.

    Floats whose bits are read as integers are in the same order, once the negative ones are turned
    around; and LLVM makes vector instructions of the maximum of integers.
    """
    logits, bits = best.logits[item], best.bits[item]
    # 1. The greatest number, and whether there is a NaN: its bits are above those of infinity.
    greatest, odd = np.int32(-(2**31)), np.int32(0)
    for index in range(len(bits)):
        odd |= np.int32((bits[index] & _MAGNITUDE) > _INFINITY)
        greatest = max(greatest, _turned(bits[index]))
    # 2. The first token that has it: chunk by chunk, since a loop that may end anywhere does not
    #    become vector instructions. Zeros of both signs are equal.
    value = float_from_bits(np.uint32(_turned(greatest)))
    is_finite = odd == 0 and abs(value) < np.float32(np.inf)
    token_id = np.uint64(0)
    for begin in range(0, len(logits), _CHUNK):
        start, equal = np.uint64(begin), np.int32(0)
        for index in range(min(np.uint64(_CHUNK), np.uint64(len(logits)) - start)):
            equal += np.int32(logits[start + index] == value)
        if equal > 0 and is_finite:
            token_id = start
            while logits[token_id] != value:
                token_id += np.uint64(1)
            break
    best.values[item] = value if is_finite else np.float32(np.nan)
    best.token_ids[item] = token_id
    best.finite[item] = is_finite


@njit(**INLINED)
def _turned(bits):
    """Turn the order of negative numbers around. Twice, it is what it was."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _MAGNITUDE))


@njit(**INLINED)
def _mix(state):
    """SplitMix64's finaliser."""
    state = (state ^ (state >> np.uint64(30))) * _MULTIPLIER_1
    state = (state ^ (state >> np.uint64(27))) * _MULTIPLIER_2
    return state ^ (state >> np.uint64(31))


@njit(**FAST)
def _stream_key(seed, position):
    """Return the key of a random stream, as `counter_rng.stream_keys`."""
    return _mix(_mix(seed + _GAMMA) + (position + np.uint64(1)) * _GAMMA)


@njit(**FAST)
def _uniform(key, token_id):
    """Return the uniform number of `counter_rng.exponential`: SplitMix64's hash, 63 bits, within
    (0, 1)."""
    state = _mix((np.uint64(token_id) + np.uint64(1)) * _GAMMA + key) & _MASK
    return (np.float32(np.int64(state)) + np.float32(0.5)) * _UNIT
