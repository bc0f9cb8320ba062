"""What a layer that keeps a state must know of a step, and what a device does for it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch


class StepLayout(Protocol):
    """The layout of a step, as attention gets it: query_start_loc `[S + 1]` and seq_lens `[S]`
    int32. A row as long as its sequence begins without a state; no row has more than max_query_len
    tokens."""

    @property
    def query_start_loc(self) -> torch.Tensor: ...

    @property
    def seq_lens(self) -> torch.Tensor: ...

    @property
    def max_query_len(self) -> int: ...

    @property
    def states(self) -> StepStates | None: ...


class StateOps(Protocol):
    """The operations of such layers on a device. Both read and write the states of the step's
    slots; `kernels/reference_states.py` says what they compute."""

    def pack_filter(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """Prepare the filter of a convolution, `[channels, K]` and `[channels]`, for `convolve`."""

    def convolve(
        self, x: torch.Tensor, packed: Any, states: torch.Tensor, step: StepLayout
    ) -> torch.Tensor:
        """Return the causal convolution of x `[T, channels]`, like x. states is one layer's
        `[num_slots, K − 1, channels]`."""

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
        """Return what the tokens read from their states, like value `[T, heads, value_dim]`.
        log_decay and beta are `[T, heads]` float32, states is one layer's
        `[num_slots, heads, key_dim, value_dim]`."""


class StepStates(NamedTuple):
    """The states of all slots, and those of the step's rows.

    convolution  [num_layers, num_slots, taps, channels] float32
    recurrent    [num_layers, num_slots, heads, key_dim, value_dim] float32
    slots        [S] int32: each row's slot, −1 for none (may be longer)
    saves        [T] int32: the slot that gets the state after a token, −1 for none (may be longer)
    """

    convolution: torch.Tensor
    recurrent: torch.Tensor
    slots: torch.Tensor
    saves: torch.Tensor

    def of_token(self, row: int, token: int) -> StepStates:
        """Return the states of a step that consists of one token of a row of this one."""
        return self._replace(slots=self.slots[row:], saves=self.saves[token:])
