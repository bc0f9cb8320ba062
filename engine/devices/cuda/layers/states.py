"""The operations of layers that keep a state, on CUDA. Importing this loads Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .....kernels.cuda.states.chunked_recurrence import MIN_TOKENS
from ....states.step_states import StepLayout
from .kernels import Kernels


class Filter(NamedTuple):
    """A convolution's weight `[channels, K]` and bias `[channels]`."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class CudaStateOps:
    """Implements StateOps, which states the contract."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def pack_filter(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Filter:
        return Filter(weight.contiguous(), bias)

    def convolve(
        self, x: torch.Tensor, packed: Filter, states: torch.Tensor, step: StepLayout
    ) -> torch.Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        return self._kernels.causal_conv(x, *packed, states, *_rows_of(step))

    def recur(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_decay: torch.Tensor,
        beta: torch.Tensor | None,
        states: torch.Tensor,
        step: StepLayout,
        *,
        scale: float,
        normalise: bool,
    ) -> torch.Tensor:
        gates, options = (log_decay, beta), {"scale": scale, "normalise": normalise}
        one_by_one = step.max_query_len < MIN_TOKENS
        recur = self._kernels.gated_recurrence if one_by_one else self._kernels.chunked_recurrence
        return recur(query, key, value, *gates, states, *_rows_of(step), **options)


def _rows_of(step: StepLayout) -> tuple[torch.Tensor, ...]:
    """Return what the kernels need to know of the rows."""
    assert step.states is not None
    return step.states.slots, step.states.saves, step.query_start_loc, step.seq_lens
