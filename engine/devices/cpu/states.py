"""The operations of layers that keep a state on the CPU, in float32. Importing this loads Numba."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import torch

from ....kernels.cpu.arrays import as_array, thread_count
from ....kernels.cpu.states.convolution import CHANNELS, Convolution, causal_conv
from ....kernels.cpu.states.recurrence import COLUMNS, Recurrence, gated_recurrence
from ...states.step_states import StepLayout, StepStates

_NO_BETA = np.zeros((0, 1), dtype=np.float32)


class Filter(NamedTuple):
    """A convolution's weight `[K, channels]` and bias `[channels]`, float32."""

    weight: torch.Tensor
    bias: torch.Tensor


class CpuStateOps:
    """Implements StateOps, which states the contract."""

    def pack_filter(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Filter:
        zeros = torch.zeros(len(weight))
        return Filter(
            weight.float().T.contiguous(), zeros if bias is None else bias.float().clone()
        )

    def convolve(
        self, x: torch.Tensor, packed: Filter, states: torch.Tensor, step: StepLayout
    ) -> torch.Tensor:
        out = torch.empty(x.shape)
        num_threads, own = thread_count(), _states_of(step)
        numba.set_num_threads(num_threads)
        work = Convolution(
            as_array(x.float()),
            packed.weight.numpy(),
            packed.bias.numpy(),
            states.numpy(),
            own.slots.numpy(),
            own.saves.numpy(),
            step.query_start_loc.numpy(),
            step.seq_lens.numpy(),
            np.empty((num_threads, CHANNELS), dtype=np.float32),
            out.numpy(),
        )
        causal_conv(work, num_threads)
        return out.to(x.dtype)

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
        out = torch.empty(value.shape)
        num_threads, own = thread_count(), _states_of(step)
        numba.set_num_threads(num_threads)
        work = Recurrence(
            as_array(query.float()),
            as_array(key.float()),
            as_array(value.float()),
            as_array(log_decay.exp()),
            _NO_BETA if beta is None else as_array(beta),
            states.numpy(),
            own.slots.numpy(),
            own.saves.numpy(),
            step.query_start_loc.numpy(),
            step.seq_lens.numpy(),
            np.empty((num_threads, 3, max(COLUMNS, key.shape[2])), dtype=np.float32),
            out.numpy(),
            np.float32(scale),
            normalise,
        )
        gated_recurrence(work, num_threads)
        return out.to(value.dtype)


def _states_of(step: StepLayout) -> StepStates:
    assert step.states is not None
    return step.states
