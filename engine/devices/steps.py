"""One step's layout: on the host (HostStep), and as tensors on the device (DeviceStep)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from ..sampling.draws import BestTokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..step import SequenceSpec


class StateRows(NamedTuple):
    """The slots of states that a step uses: one for each row `[S]`, and for each snapshot the
    number of a token of the step and the slot that gets the state after it `[N, 2]`."""

    slots: NDArray[np.int64]
    saves: NDArray[np.int64]


class HostStep(NamedTuple):
    """One step on the host. Batch row i is row `order[i]` of the plan.

    Rows with one new token come first (`num_decodes`). `sampling_rows` are the batch rows that
    sample, ascending, and `sampled_positions` the positions of their new tokens; a row with drafts
    stands there once for each token that it samples, and `num_drafts` says how many drafts precede
    each one (it is empty if no row has drafts). `pooled_rows` are
    those whose hidden states are pooled. `any_scored` says whether a request asks for its prompt's
    log-probabilities. Row i's block table is `tables[g, rows[i]]` in group g of the layers;
    `tables` is no wider than the longest row needs.
    """

    order: list[int]
    sequences: list[SequenceSpec]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    num_decodes: int
    max_query_len: int
    sampling_rows: NDArray[np.int64]
    sampled_positions: list[int]
    num_drafts: list[int]
    pooled_rows: list[int]
    any_scored: bool
    query_start_loc: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    rows: NDArray[np.int64]
    tables: NDArray[np.int32]
    token_slots: NDArray[np.int64] | None = None
    """The slot of each token's LoRA adapter, −1 for none; None if no token has one."""
    states: StateRows | None = None
    """The slots of states, if layers keep any."""

    @property
    def reads_hidden(self) -> bool:
        """Whether hidden states are read of tokens that need no logits."""
        return self.any_scored or bool(self.pooled_rows)


class DeviceStep(NamedTuple):
    """The step's tensors on the device. They are views of persistent buffers, valid until the
    next step.

    If the device pads decode-only steps, S and T are the padded size. A padded row has length 0
    and slot −1. Steps with drafts may be padded to the same number of tokens in each row
    (`StepInputs.query_len`); those after a row's own have the slot −1, and seq_lens counts them.
    Mixed steps may be padded at their end (`StepInputs.mixed_size`).

    input_ids, positions `[T]`, slot_mapping `[G, T]` int64; block_table `[G, S, max_blocks]`,
    query_start_loc `[S + 1]`, seq_lens `[S]` int32; logit_indices `[R]` int64, the token before
    each sample. G is the number of groups of layers that have block tables of their own.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    logit_indices: torch.Tensor

    @classmethod
    def allocate(
        cls,
        num_tokens: int,
        num_seqs: int,
        max_blocks: int,
        device: torch.device,
        num_groups: int = 1,
    ) -> DeviceStep:
        """Allocate zeroed buffers for steps of at most this many tokens, rows and blocks a row."""
        # The slots of every group begin at a multiple of 16 bytes, as Triton's kernels expect.
        padded = num_tokens + num_tokens % 2

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            input_ids=zeros(torch.int64, num_tokens),
            positions=zeros(torch.int64, num_tokens),
            slot_mapping=zeros(torch.int64, num_groups, padded),
            block_table=zeros(torch.int32, num_groups, num_seqs, max_blocks),
            query_start_loc=zeros(torch.int32, num_seqs + 1),
            seq_lens=zeros(torch.int32, num_seqs),
            logit_indices=zeros(torch.int64, num_tokens),
        )

    def narrow(self, num_tokens: int, num_seqs: int, num_logits: int) -> DeviceStep:
        """Return views of the first elements of these buffers, as a step of this size has them."""
        return DeviceStep(
            self.input_ids[:num_tokens],
            self.positions[:num_tokens],
            self.slot_mapping[:, :num_tokens],
            self.block_table[:, :num_seqs],
            self.query_start_loc[: num_seqs + 1],
            self.seq_lens[:num_seqs],
            self.logit_indices[:num_logits],
        )


class StepInputs(Protocol):
    """Makes a step's tensors, on the host or on the device itself."""

    def change_table(self, group: int, row: int, start: int) -> None:
        """Note that a row of a group's `HostStep.tables` has changed from column `start` on."""

    def query_len(self, host: HostStep) -> int:
        """Return to how many tokens each row of a step with drafts is padded; 1 if its rows are
        not padded."""

    def mixed_size(self, host: HostStep) -> int:
        """Return to how many tokens a step is padded at its end that has rows of several tokens and
        is not padded by `query_len`; 0 if it is not padded. The first rows and tokens of its
        tensors are those of the step without padding."""

    def write(
        self, host: HostStep, token_ids: NDArray[np.int64], sampled: torch.Tensor
    ) -> DeviceStep:
        """Make the step's tensors. A negative id −1 − i stands for `sampled[i]`, which only the
        device knows; only rows with one new token have such ids."""


class ModelOutput(NamedTuple):
    """Hidden states `[T, hidden_size]` (of the sampling rows alone if nobody reads the others) and
    logits `[R, vocab_size]` of a step, and the likeliest tokens of these if the device has found
    them, too."""

    hidden: torch.Tensor
    logits: torch.Tensor
    best: BestTokens | None = None


class GraphKey(NamedTuple):
    """Identifies a captured step: its padded number of rows, whether the rows' shared prefixes are
    read once for all of them, whether any row has a LoRA adapter, and the padded number of tokens
    of each row: more than one if rows have drafts. Of a mixed step, `size` is the padded number of
    tokens in all rows."""

    size: int
    shared: bool
    adapted: bool = False
    query_len: int = 1
    mixed: bool = False

    @property
    def num_tokens(self) -> int:
        """The padded number of the step's tokens."""
        return self.size * self.query_len
