"""Random steps of rows that have states, as arguments of the operations on states."""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensors = tuple[torch.Tensor, ...]


class StateStep(NamedTuple):
    """Where the rows of a step are, and their slots. Row i has a slot of its own, or none."""

    slots: torch.Tensor
    saves: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_loc[-1])


def state_step(
    lengths: list[int], starts: list[int], *, seed: int = 0, saved: float = 0.3
) -> StateStep:
    """Make a step whose row i has lengths[i] tokens after starts[i] others. A start of −1 is that
    of a row without a slot. About this share of tokens is followed by a snapshot.

    The slots of rows and snapshots are below `num_slots`.
    """
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    is_saved = torch.rand(num_tokens, generator=generator) < saved
    order = torch.randperm(len(lengths) + int(is_saved.sum()), generator=generator).int()
    slots, saves = order[: len(lengths)], torch.full((num_tokens,), -1, dtype=torch.int32)
    slots[torch.tensor(starts) < 0] = -1
    saves[is_saved] = order[len(lengths) :]
    sizes = torch.tensor(lengths, dtype=torch.int32)
    loc = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    loc[1:] = sizes.cumsum(0)
    seq_lens = sizes + torch.tensor(starts, dtype=torch.int32).clamp(min=0)
    return StateStep(slots.clone(), saves, loc, seq_lens)


def num_slots(step: StateStep) -> int:
    return len(step.seq_lens) + int((step.saves >= 0).sum())


class Convolution(NamedTuple):
    """Arguments of `causal_conv` before those of the step."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    states: torch.Tensor


def convolution(
    step: StateStep, channels: int, width: int, dtype: torch.dtype, *, has_bias: bool
) -> Convolution:
    """Make random arguments, x a part of a wider tensor."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = draw(step.num_tokens, channels + 8).to(dtype)[:, :channels]
    weight, bias = draw(channels, width).to(dtype), draw(channels).to(dtype)
    states = draw(num_slots(step), width - 1, channels)
    return Convolution(x, weight, bias if has_bias else None, states)


class Recurrence(NamedTuple):
    """Arguments of `gated_recurrence` before those of the step."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    log_decay: torch.Tensor
    beta: torch.Tensor | None
    states: torch.Tensor


def recurrence(
    step: StateStep, heads: tuple[int, int, int, int], dtype: torch.dtype, *, has_beta: bool
) -> Recurrence:
    """Make random arguments for key heads, heads, key dim and value dim; query, key and value are
    parts of one tensor."""
    key_heads, num_heads, key_dim, value_dim = heads
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    keys, values = key_heads * key_dim, num_heads * value_dim
    packed = draw(step.num_tokens, 2 * keys + values).to(dtype)
    query, key, value = packed.split([keys, keys, values], dim=1)
    decay, beta = draw(2, step.num_tokens, num_heads).sigmoid()
    return Recurrence(
        query.unflatten(1, (key_heads, key_dim)),
        key.unflatten(1, (key_heads, key_dim)),
        value.unflatten(1, (num_heads, value_dim)),
        decay.log(),
        beta if has_beta else None,
        draw(num_slots(step), num_heads, key_dim, value_dim),
    )


STEPS: dict[str, tuple[list[int], list[int]]] = {
    "a prompt": ([9], [0]),
    "decodes": ([1, 1, 1, 1], [4, 1, 0, 700]),
    "mixed": ([1, 7, 2, 5, 1], [3, 0, 1, 40, -1]),
}
"""Lengths and starts of rows."""
WIDTHS = [(8, 2, True), (130, 4, False), (300, 3, True)]
"""Channels, width of the filter, and whether there is a bias."""
HEADS = [(2, 4, 8, 12), (1, 3, 16, 40), (4, 4, 33, 64)]
"""Key heads, heads, key dim, value dim."""
