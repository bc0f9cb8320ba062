"""The two kernels of layers that keep a state on the GPU: checked against float64, and timed."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from gpu_common import DEVICE

from quire.kernels import reference_states
from quire.kernels.cuda.states.causal_conv import causal_conv
from quire.kernels.cuda.states.gated_recurrence import gated_recurrence

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))
from state_steps import StateStep, convolution, recurrence, state_step  # noqa: E402

Heads = tuple[int, int, int, int]
ROWS = ([37, 1, 300, 1, 5], [0, 50, 300, 0, -1])
"""Lengths and starts of the rows that are checked."""


def _on_device(tensors: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def check_convolution(dtype: torch.dtype, channels: int, width: int) -> list[torch.Tensor]:
    """Return outputs and states of the kernel, each before what the reference says in float64."""
    step = state_step(*ROWS)
    made = convolution(step, channels, width, dtype, has_bias=True)
    have, rows = _on_device(made), _on_device(step)
    wide = [None if tensor is None else tensor.double() for tensor in have]
    out = causal_conv(*have, *rows)  # type: ignore[arg-type]
    wanted = reference_states.causal_conv(*wide, *rows)  # type: ignore[arg-type]
    assert have[-1] is not None and wide[-1] is not None
    return [out, wanted, have[-1], wide[-1]]


def check_recurrence(dtype: torch.dtype, heads: Heads, has_beta: bool) -> list[torch.Tensor]:
    """Return what `check_convolution` does, of the recurrence."""
    step = state_step(*ROWS)
    have, rows = _on_device(recurrence(step, heads, dtype, has_beta=has_beta)), _on_device(step)
    options = {"scale": 0.3, "normalise": has_beta}
    wide = [None if tensor is None else tensor.double() for tensor in have]
    out = gated_recurrence(*have, *rows, **options)  # type: ignore[arg-type]
    wanted = reference_states.gated_recurrence(*wide, *rows, **options)  # type: ignore[arg-type]
    assert have[-1] is not None and wide[-1] is not None
    return [out, wanted, have[-1], wide[-1]]


def calls_of_states(
    lengths: list[int], channels: int, heads: Heads
) -> tuple[list[functools.partial[torch.Tensor]], int]:
    """Return the launches of one layer with the delta rule, and the bytes that they move: each
    row's state is read and written once, and so is every token."""
    step: StateStep = state_step(lengths, [100] * len(lengths))
    step.saves.fill_(-1)
    rows = _on_device(step)
    taps = _on_device(convolution(step, channels, 4, torch.bfloat16, has_bias=False))
    gates = _on_device(recurrence(step, heads, torch.bfloat16, has_beta=True))
    convolve = functools.partial(causal_conv, *taps, *rows)
    options = {"scale": 0.1, "normalise": True}
    recur = functools.partial(gated_recurrence, *gates, *rows, **options)  # type: ignore[arg-type]
    states = [tensors[-1] for tensors in (taps, gates)]
    moved = sum(2 * len(lengths) * tensor[0].nbytes for tensor in states if tensor is not None)
    assert taps[0] is not None
    return [convolve, recur], moved + 4 * taps[0].nbytes  # type: ignore[list-item]
