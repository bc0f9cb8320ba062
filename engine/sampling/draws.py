"""Argmax and draws over rows of logits: the parts of sampling that differ by device.

A draw is an exponential race: the token with the largest p_i / E_i, E_i ~ Exp(1), wins with
probability p_i / Σp (the Gumbel-max trick without the logarithm). The E are a hash of seed,
position and token id (counter_rng.py). The race needs no normaliser, maxima and comparisons are
exact, and the masses that top_p sums are integers: no result depends on the order of a
reduction, hence on the batch's size. So every device can draw the same tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .counter_rng import exponential, stream_keys
from .plan import DrawGroup
from .top_tokens import top_tokens

_MASS_UNIT = 2.0**40
"""Integer mass of the likeliest token; a vocabulary's sum stays below 2^63 up to 2^23 tokens."""


class BestTokens(NamedTuple):
    """Of R rows of logits: the maxima, the first ids that have them, and whether the rows are
    finite (bool). A row that is not has an arbitrary maximum and id."""

    values: Tensor
    token_ids: Tensor
    finite: Tensor

    def rows(self, count: int) -> BestTokens:
        """Return the first `count` rows, as views."""
        return BestTokens(*(part[:count] for part in self))

    def at(self, indices: Tensor) -> BestTokens:
        """Return copies of these rows."""
        return BestTokens(*(part.index_select(0, indices) for part in self))


class DrawOps(Protocol):
    """The parts of sampling that each device does in its own way."""

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maxima [R] of rows [R, V] and the first ids [R] that have them. The maximum
        of a row with a NaN is NaN."""

    def draw(self, x: Tensor, best: Tensor, group: DrawGroup, positions: Tensor) -> Tensor:
        """Draw a token id for each row of a group [G], from the working logits [W, V] of any float
        type and their maxima [W]. `positions` [R] are those of the batch's rows."""


class TorchDraws:
    """DrawOps in plain torch, on any device."""

    def __init__(self, vocab_size: int, device: torch.device, max_elements: int = 1 << 25) -> None:
        """Draw from at most `max_elements` logits at a time, which bounds the memory."""
        self._token_ids = torch.arange(vocab_size, device=device)
        self._max_elements = max_elements

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.max(dim=1)

    def race(self, relative: Tensor, keys: Tensor, token_ids: Tensor) -> Tensor:
        """Return the winners [R]: argmax over N of exp(relative [R, N]) / Exp(1). `token_ids` are
        [N] or [R, N]."""
        return relative.exp().div_(exponential(keys, token_ids)).argmax(dim=1)

    def draw(self, x: Tensor, best: Tensor, group: DrawGroup, positions: Tensor) -> Tensor:
        keys = stream_keys(group.seeds, positions.index_select(0, group.batch_rows))
        rows = max(1, self._max_elements // x.shape[1])
        draw = self._draw_candidates if group.num_candidates else self._draw_vocabulary
        pieces = []
        for start in range(0, len(keys), rows):
            piece = group.slice(start, start + rows)
            logits = x.index_select(0, piece.working_rows).to(torch.float32)
            top = best.index_select(0, piece.working_rows).to(torch.float32).unsqueeze(1)
            pieces.append(draw(logits, top, keys[start : start + rows], piece))
        return torch.cat(pieces)

    def _draw_vocabulary(self, x: Tensor, top: Tensor, keys: Tensor, group: DrawGroup) -> Tensor:
        """Draw from all tokens of `x` [G, V] (overwritten), whose maxima are `top` [G, 1]."""
        relative = x.sub_(top).div_(group.temperature)
        if group.top_k is not None or group.top_p is not None:
            _filter(relative, group.top_k, group.top_p)
        if group.log_min_p is not None:
            relative.masked_fill_(relative < group.log_min_p, -torch.inf)
        return self.race(relative, keys, self._token_ids)

    def _draw_candidates(self, x: Tensor, top: Tensor, keys: Tensor, group: DrawGroup) -> Tensor:
        """Draw from the top_k best of `x` [G, V]; of equal logits the lower id is better."""
        assert group.top_k is not None
        values, token_ids = top_tokens(x, group.num_candidates, group.top_k)
        relative = values.sub_(top).div_(group.temperature)
        dropped = self._token_ids[: group.num_candidates] >= group.top_k
        if group.top_p is not None:
            mass = _masses(relative).masked_fill_(dropped, 0)
            likelier = mass.cumsum(dim=1) - mass
            dropped |= likelier >= _target_mass(mass, group.top_p)
        if group.log_min_p is not None:
            dropped |= relative < group.log_min_p
        winner = self.race(relative.masked_fill_(dropped, -torch.inf), keys, token_ids)
        return token_ids.gather(1, winner.unsqueeze(1)).squeeze(1)


def _masses(relative: Tensor) -> Tensor:
    """Return exp(relative ≤ 0) in fixed point, int64: sums are exact in any order."""
    return (relative.exp() * _MASS_UNIT).to(torch.int64)


def _target_mass(mass: Tensor, top_p: Tensor) -> Tensor:
    """Return the mass [R, 1] that a nucleus must reach; at least 1, so that it is never empty."""
    return (mass.sum(dim=1, keepdim=True) * top_p).ceil_().to(torch.int64).clamp_(min=1)


def _filter(relative: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> None:
    """Set the tokens that top_k, then top_p drop to -inf, in place; equal logits stay or go
    together."""
    # The bits of a non-negative float order as it does; clearing the sign makes 0 of -0, too.
    distance = relative.view(torch.int32) & 0x7FFFFFFF
    if top_k is not None:
        ones = torch.ones_like(distance, dtype=torch.int64)
        relative.masked_fill_(distance > _covering_key(distance, ones, top_k), -torch.inf)
    if top_p is not None:
        mass = _masses(relative)
        limit = _covering_key(distance, mass, _target_mass(mass, top_p))
        relative.masked_fill_(distance > limit, -torch.inf)


def _covering_key(keys: Tensor, mass: Tensor, target: Tensor) -> Tensor:
    """Return the least key t [R, 1] such that the mass of all keys ≤ t reaches the target [R, 1].

    `keys` [R, N] int32 ≥ 0, `mass` [R, N] int64 ≥ 0. If the sum never reaches the target, t is
    the largest int32. This is a radix select, in place of a sort of the vocabulary; integer sums
    make it exact and independent of their order.
    """
    # Three histograms of mass: by the first 11 bits of all keys, then by the next 10 bits of the
    # keys that share the limit's first bits, then by their last 10.
    prefix = torch.zeros_like(target)
    for shift, width in ((20, 11), (10, 10), (0, 10)):
        digits = (keys >> shift).to(torch.int64)
        inside = mass if shift == 20 else mass.masked_fill(digits >> width != prefix, 0)
        size = 1 << width
        histogram = inside.new_zeros((keys.shape[0], size))
        histogram.scatter_add_(1, digits.bitwise_and_(size - 1), inside)
        reached = histogram.cumsum(dim=1)
        digit = (reached < target).sum(dim=1, keepdim=True).clamp_(max=size - 1)
        # The rest of the target, to be reached within this digit's keys.
        target = target - (reached.gather(1, digit) - histogram.gather(1, digit))
        prefix = (prefix << width) | digit
    return prefix
