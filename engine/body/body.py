"""A model's body: its layers, from token ids to hidden states, without the language-model head.

There are three ways to run one: transformers' own code (HfBody), the flat decoder with the
operations of a device (FlatBody), and the flat decoder compiled (the CPU's CpuDecoder). A device's
backend chooses at load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..attention.metadata import AttentionMetadata
from .flat_decoder import BodyOps, FlatDecoder
from .rotary_table import make_rotary_table


class BodyOutput(NamedTuple):
    """Hidden states `[T, hidden_size]`, and logits `[R, vocab_size]` of some of the T tokens."""

    hidden: torch.Tensor
    logits: torch.Tensor
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """The maxima of the logits, the first ids that have them, and whether the rows are finite,
    `[R]` each, if they have been found."""


class ForwardToLogits(Protocol):
    """Runs layers, and makes logits of some tokens."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logit_indices: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        picked_only: bool = False,
    ) -> BodyOutput:
        """input_ids and positions `[T]`, logit_indices `[R]`: see BodyOutput. With `picked_only`
        hidden states are those of the R tokens alone."""


class Body(Protocol):
    """Runs the layers of a model over packed tokens."""

    @property
    def is_batch_invariant(self) -> bool:
        """Whether hidden states and logits of a token are the same to the bit, whatever else is in
        the step: other rows, and other tokens of its own row."""

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """input_ids and positions `[T]` int64 → hidden states `[T, hidden_size]`, after the last
        norm."""

    def expect_positions(self, length: int) -> None:
        """Prepare for positions below `length`, which are all that will come."""

    def fuse_head(self, product: nn.Module) -> ForwardToLogits | None:
        """Return a function that runs the body and then `product`, the linear layer that makes
        logits of hidden states, in one. None if this body knows none."""


class HfBody:
    """The layers as transformers runs them."""

    is_batch_invariant = False  # matrix libraries choose their order of summation by the shape

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        output: Any = self._model(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            attn_metadata=metadata,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden[0]

    def expect_positions(self, length: int) -> None:
        """Do nothing: the model's own code computes rotary factors."""

    def fuse_head(self, product: nn.Module) -> ForwardToLogits | None:
        return None


class FlatBody:
    """A FlatDecoder with the operations that a device makes for each step."""

    is_batch_invariant = False

    def __init__(
        self, decoder: FlatDecoder, make_ops: Callable[[AttentionMetadata], BodyOps]
    ) -> None:
        self.decoder = decoder
        self._make_ops = make_ops

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        return self.decoder(input_ids, positions, self._make_ops(metadata))

    def expect_positions(self, length: int) -> None:
        self.decoder = self.decoder._replace(rotations=make_rotary_table(self.decoder, length))

    def fuse_head(self, product: nn.Module) -> ForwardToLogits | None:
        return None
