"""Counter-based random numbers: a pure function of (seed, position, token id).

A generator with a state would make a sample depend on what was drawn before it. A hash of a
counter does not (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), so a sequence draws the same tokens whatever shares its batch, after a preemption, and
on every device. The hash is SplitMix64's (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014): its n-th output is `mix(key + n * GAMMA)`, which needs no
predecessor, and it takes only the int64 additions, multiplications, shifts and xors that torch
has on every device; Philox wants 32×32→64-bit products. It is not a cryptographic generator.

torch has no unsigned 64-bit arithmetic: int64 wraps modulo 2^64 alike, and a logical right shift
is an arithmetic one with the sign's copies masked off.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64
_INT63_MAX = 2**63 - 1
# The largest float32 below 1, in units of 2^-63: a hash that rounds up to 2^63 stays below 1.
_NEGATIVE_UNIT = -(1.0 - 2.0**-24) * 2.0**-63


def _mix_(state: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64 bits, in place."""
    shifted = torch.empty_like(state)
    for shift, multiplier in ((30, _MULTIPLIER_1), (27, _MULTIPLIER_2), (31, None)):
        torch.bitwise_right_shift(state, shift, out=shifted)
        state.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - shift) - 1))
        if multiplier is not None:
            state.mul_(multiplier)
    return state


def stream_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """Keys [R] int64 of the streams of `seeds` [R] at `positions` [R], both int64."""
    return _mix_(_mix_(seeds + _GAMMA).add_((positions + 1).mul_(_GAMMA)))


def exponential(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Draw E ~ Exp(1) for every (key, token id).

    `keys` [R]; `token_ids` [N] or [R, N], int64. Returns [R, N] float32, each above 0 and finite:
    E = -log(1 - u) with u = (h + 1/2) / 2^63, h the hash's low 63 bits. Small E decide a race
    over many tokens, and there u has float32's full relative precision.
    """
    bits = _mix_(((token_ids + 1) * _GAMMA) + keys.unsqueeze(1))
    negative_u = bits.bitwise_and_(_INT63_MAX).to(torch.float32).add_(0.5).mul_(_NEGATIVE_UNIT)
    return negative_u.log1p_().neg_()
