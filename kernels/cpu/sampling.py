"""A draw from a row's tokens on the CPU, compiled by Numba: the race of `sampler`, in one pass.

Most tokens lose without their logarithm: E = -log(1 - u) is at least u, so a token of weight p can
only beat the best quotient s so far where u s < p.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .numbers import FAST, PARALLEL, exp

_CHUNK = 256
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_MASK = np.uint64(2**63 - 1)
_UNIT = np.float32((1.0 - 2.0**-24) * 2.0**-63)


@njit(**PARALLEL)
def race(relative, keys, token_ids, winners):
    """winners `[R]`: argmax over N of exp(relative `[R, N]`) / E, where E is
    `counter_rng.exponential(keys [R], token_ids)`, token_ids `[1, N]` or `[R, N]`; 0 where all
    weigh nothing."""
    top, temperature = np.float32(0), np.float32(1)
    for row in prange(len(relative)):
        ids = token_ids[np.uint64(row) % np.uint64(len(token_ids))]
        winners[row] = _race(relative[row], top, temperature, np.uint64(keys[row]), ids)


@njit(**PARALLEL)
def draw(logits, rows, tops, temperatures, seeds, positions, batch_rows, token_ids, winners):
    """winners `[G]` of the race over rows `[G]` of logits `[W, N]`, whose maxima are tops `[W]`:
    relative is (logits - top) / temperatures `[G, 1]`. The keys are those that
    `counter_rng.stream_keys` makes of seeds `[G]` and positions `[R]`[batch_rows `[G]`]."""
    for row in prange(len(rows)):
        key = _stream_key(np.uint64(seeds[row]), np.uint64(positions[batch_rows[row]]))
        line, top = logits[rows[row]], tops[rows[row]]
        winners[row] = _race(line, top, temperatures[row, 0], key, token_ids[0])


@njit(**FAST)
def _race(logits, top, temperature, key, token_ids):
    weights = np.empty(_CHUNK, dtype=np.float32)
    uniforms = np.empty(_CHUNK, dtype=np.float32)
    winner, best = np.int64(0), np.float32(0)
    for begin in range(0, len(logits), _CHUNK):
        start = np.uint64(begin)
        count = min(np.uint64(_CHUNK), np.uint64(len(logits)) - start)
        for index in range(count):
            logit = (logits[start + index] - top) / temperature
            weights[index] = exp(logit) if logit > np.float32(-87) else np.float32(0)
            uniforms[index] = _uniform(key, token_ids[start + index])
        hopeful = np.int32(
            0
        )  # counted without a branch, so with vectors: of most chunks no token is
        for index in range(count):
            hopeful += np.int32(uniforms[index] * best < weights[index])
        if hopeful == 0:
            continue
        for index in range(count):
            weight, uniform = weights[index], uniforms[index]
            if uniform * best < weight:
                quotient = weight / -np.log1p(-uniform)
                if quotient > best:
                    winner, best = np.int64(start + index), quotient
    return winner


@njit(**FAST)
def _mix(state):
    """SplitMix64's finaliser."""
    state = (state ^ (state >> np.uint64(30))) * _MULTIPLIER_1
    state = (state ^ (state >> np.uint64(27))) * _MULTIPLIER_2
    return state ^ (state >> np.uint64(31))


@njit(**FAST)
def _stream_key(seed, position):
    return _mix(_mix(seed + _GAMMA) + (position + np.uint64(1)) * _GAMMA)


@njit(**FAST)
def _uniform(key, token_id):
    """As `counter_rng.exponential` has it: SplitMix64's hash, 63 bits, within (0, 1)."""
    state = _mix((np.uint64(token_id) + np.uint64(1)) * _GAMMA + key) & _MASK
    return (np.float32(np.int64(state)) + np.float32(0.5)) * _UNIT
