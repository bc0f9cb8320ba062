"""A draw from a row's tokens on the CPU, compiled by Numba: the race of `sampler`, in one pass.

Most tokens lose without their logarithm: E = -log(1 - u) is at least u, so a token of weight p can
only beat the best quotient s so far where u s < p.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .cpu_numbers import FAST, PARALLEL, exp

_CHUNK = 256
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_MASK = np.uint64(2**63 - 1)
_UNIT = np.float32((1.0 - 2.0**-24) * 2.0**-63)


@njit(**PARALLEL)
def race(logits, rows, tops, temperatures, keys, token_ids, winners):
    """winners `[G]`: argmax over N of exp(l) / E, where l = (logits `[W, N]`[rows `[G]`] - tops
    `[G]`) / temperatures `[G]` and E is `counter_rng.exponential(keys [G], token_ids)`, token_ids
    `[1, N]` or `[G, N]`; 0 where all weigh nothing."""
    for row in prange(len(rows)):
        ids = token_ids[np.uint64(row) % np.uint64(len(token_ids))]
        line = logits[rows[row]]
        winners[row] = _race(line, tops[row], temperatures[row], np.uint64(keys[row]), ids)


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
        for index in range(count):
            weight, uniform = weights[index], uniforms[index]
            if uniform * best < weight:
                quotient = weight / -np.log1p(-uniform)
                if quotient > best:
                    winner, best = np.int64(start + index), quotient
    return winner


@njit(**FAST)
def _uniform(key, token_id):
    """As `counter_rng.exponential` has it: SplitMix64's hash, 63 bits, within (0, 1)."""
    state = (np.uint64(token_id) + np.uint64(1)) * _GAMMA + key
    state = (state ^ (state >> np.uint64(30))) * _MULTIPLIER_1
    state = (state ^ (state >> np.uint64(27))) * _MULTIPLIER_2
    state = (state ^ (state >> np.uint64(31))) & _MASK
    return (np.float32(np.int64(state)) + np.float32(0.5)) * _UNIT
