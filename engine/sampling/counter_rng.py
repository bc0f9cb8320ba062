"""Counter-based random numbers: a pure function of (seed, position, token id).

With a stateful generator a sample would depend on what was drawn before it. A hash of a counter
has no state (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
2011), so a sequence draws the same random numbers whatever else is in its batch, after a
preemption, and on every device. The hash is that of SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014). Its n-th output is `mix(key + n * GAMMA)`,
which does not need the outputs before it, and it consists of int64 additions, multiplications,
shifts and xors, which torch has on every device. (Philox would need 32×32→64-bit products.) The
generator is not cryptographic.

torch has no unsigned 64-bit arithmetic, but int64 wraps modulo 2^64 in the same way, and a logical
right shift is an arithmetic one whose copies of the sign bit are masked off.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64
_INT63_MAX = 2**63 - 1
_NEGATIVE_UNIT = -(1.0 - 2.0**-24) * 2.0**-63
"""Minus the largest float32 below 1, divided by 2^63: it scales a hash to (−1, 0). Even a hash that
rounds up to 2^63 stays above −1."""


def _mix_(state: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser, a bijection of 64-bit integers, in place."""
    shifted = torch.empty_like(state)
    for shift, multiplier in ((30, _MULTIPLIER_1), (27, _MULTIPLIER_2), (31, None)):
        torch.bitwise_right_shift(state, shift, out=shifted)
        state.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - shift) - 1))
        if multiplier is not None:
            state.mul_(multiplier)
    return state


def stream_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return the keys [R] int64 for `seeds` [R] at `positions` [R], both int64."""
    return _mix_(_mix_(seeds + _GAMMA).add_((positions + 1).mul_(_GAMMA)))


def exponential(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Draw E ~ Exp(1) for every (key, token id).

    `keys` is [R] and `token_ids` is [N] or [R, N], all int64. Returns [R, N] float32, each above 0
    and finite: E = -log(1 - u), where u = (h + 1/2) / 2^63 and h is the low 63 bits of the hash. In
    a race over many tokens the small E decide, and for them u has float32's full relative
    precision.
    """
    bits = _mix_(((token_ids + 1) * _GAMMA) + keys.unsqueeze(1))
    negative_u = bits.bitwise_and_(_INT63_MAX).to(torch.float32).add_(0.5).mul_(_NEGATIVE_UNIT)
    return negative_u.log1p_().neg_()
