"""The kernels of layers that keep a state on the GPU: checked against float64, and timed."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from gpu_common import DEVICE

from quire.kernels import reference_states
from quire.kernels.cuda.states.causal_conv import causal_conv
from quire.kernels.cuda.states.chunked_recurrence import chunked_recurrence
from quire.kernels.cuda.states.gated_recurrence import gated_recurrence

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))
from state_steps import StateStep, convolution, recurrence, state_step  # noqa: E402

Heads = tuple[int, int, int, int]
ROWS = ([37, 1, 300, 1, 5], [0, 50, 300, 0, -1])
"""Lengths and starts of the rows that are checked."""
RECURRENCES = {"chunked": chunked_recurrence, "recurrent": gated_recurrence}
"""The forms of the recurrence."""


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


def check_recurrence(
    dtype: torch.dtype, heads: Heads, has_beta: bool, form: str = "recurrent"
) -> list[torch.Tensor]:
    """Return what `check_convolution` does, of a form of the recurrence."""
    step = state_step(*ROWS)
    have, rows = _on_device(recurrence(step, heads, dtype, has_beta=has_beta)), _on_device(step)
    options = {"scale": 0.3, "normalise": has_beta}
    wide = [None if tensor is None else tensor.double() for tensor in have]
    out = RECURRENCES[form](*have, *rows, **options)  # type: ignore[arg-type]
    wanted = reference_states.gated_recurrence(*wide, *rows, **options)  # type: ignore[arg-type]
    assert have[-1] is not None and wide[-1] is not None
    return [out, wanted, have[-1], wide[-1]]


def calls_of_states(
    lengths: list[int], channels: int, heads: Heads
) -> tuple[list[functools.partial[torch.Tensor]], int]:
    """Return the launches of one layer with the delta rule, and the bytes that they move: each
    row's state is read and written once, and so is every token."""
    step: StateStep = state_step(lengths, [100] * len(lengths), saved=0.0)
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


def calls_of_prompt(
    form: str, num_tokens: int, heads: Heads, has_beta: bool
) -> tuple[functools.partial[torch.Tensor], int, int]:
    """Return the launches of one layer's recurrence over a prompt, and the FLOPs and bytes of the
    form in chunks of 64 tokens."""
    step = state_step([num_tokens], [0], saved=0.0)
    rows = _on_device(step)
    have = _on_device(recurrence(step, heads, torch.bfloat16, has_beta=has_beta))
    options = {"scale": 0.1, "normalise": has_beta}
    call = functools.partial(RECURRENCES[form], *have, *rows, **options)  # type: ignore[arg-type]
    _, num_heads, key_dim, value_dim = heads
    # Products with the state and among tokens, for each token and head, in multiply-adds.
    with_state, among = (3 if has_beta else 2), (2 if has_beta else 1)
    sums = with_state * key_dim * value_dim + among * 64 * (key_dim + value_dim)
    moved = sum(tensor.nbytes for tensor in have[:3] if tensor is not None)
    matrices = 2 * among * 64 * 2 * num_heads * num_tokens
    return call, 2 * num_tokens * num_heads * sums, moved + matrices
