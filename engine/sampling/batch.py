"""The input of the sampler in a step: the plan of its rows, and what changes from step to step."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.device_copy import to_device
from ..step import SequenceSpec
from .plan import PenaltyRows, PlanMaker, SamplingPlan
from .token_history import TokenHistory


class SamplingBatch(NamedTuple):
    """One step's rows. `positions[i]` is the position that row i's new token will have."""

    plan: SamplingPlan
    positions: Tensor | None  # [R] int64, if any row is drawn or penalised
    suppressed: Tensor | None  # [N] int64 flat indices of what min_tokens and bad words forbid
    history: Tensor | None  # [P, L] int32 tokens of the penalised rows, stale past the position


class SamplingBatchBuilder:
    """Builds the batches of successive steps, and keeps what outlives a step.

    `vocab_size` is the width of the logits.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.history = TokenHistory(device)
        self._maker = PlanMaker(vocab_size, device)
        self._sequences: list[SequenceSpec] = []
        self._constrained: tuple[int, ...] = ()
        self._plan = SamplingPlan(num_rows=0)
        self._suppressed_tokens: list[tuple[int, Iterable[int]]] = []
        self._suppressed: Tensor | None = None
        self._slots: list[int] = []
        self._slot_index: Tensor | None = None

    def build(
        self,
        sequences: abc.Sequence[SequenceSpec],
        positions: abc.Sequence[int] | None = None,
        constrained_rows: abc.Sequence[int] = (),
        banned: abc.Mapping[int, abc.Sequence[int]] = MappingProxyType({}),
        last_token_ids: Tensor | None = None,
    ) -> SamplingBatch:
        """Build the batch whose row i samples the token at `positions[i]` of `sequences[i]`.

        Positions default to the lengths of the sequences' known tokens. `constrained_rows`,
        ascending, have a token bitmask. Row i must not sample the tokens `banned[i]`. Rows with
        penalties read the history of their tokens, whose last one comes from `last_token_ids` [R]
        if given, since the host need not know it.
        """
        constrained = tuple(constrained_rows)
        # Almost always these are the very same objects, which makes this a scan of pointers.
        if self._sequences != sequences or self._constrained != constrained:
            self._plan = self._maker.make(sequences, constrained)
            self._sequences = list(sequences)
            self._constrained = constrained
            self._suppressed = None
            self._slot_index = None
        plan = self._plan
        if plan.working_rows is None:
            return SamplingBatch(plan, None, None, None)
        if positions is None:
            positions = [len(sequence.token_ids) for sequence in sequences]
        device_positions = None
        if plan.groups or plan.penalties is not None:
            device_positions = to_device(positions, torch.int64, self.device)
        return SamplingBatch(
            plan,
            device_positions,
            self._suppress(plan, positions, banned),
            self._record(plan.penalties, positions, device_positions, last_token_ids),
        )

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Drop what is kept for sequences that left the batch. Unknown ids are ignored."""
        seq_ids = list(seq_ids)
        if not seq_ids:
            return
        self.history.forget(seq_ids)
        for seq_id in seq_ids:
            self._maker.forget(seq_id)
        gone = set(seq_ids)
        if any(sequence.seq_id in gone for sequence in self._sequences):
            self._sequences = []

    def _suppress(
        self,
        plan: SamplingPlan,
        positions: abc.Sequence[int],
        banned: abc.Mapping[int, abc.Sequence[int]],
    ) -> Tensor | None:
        """Return the flat indices of the end tokens of rows below their min_tokens, and of the
        tokens that would complete a bad word."""
        tokens: list[tuple[int, Iterable[int]]] = [
            (row.working_row, row.stop_ids)
            for row in plan.min_tokens
            if positions[row.batch_row] < row.end_position
        ]
        tokens += [
            (row.working_row, banned[row.batch_row])
            for row in plan.bad_words
            if banned.get(row.batch_row)
        ]
        if not tokens:
            return None
        if tokens != self._suppressed_tokens or self._suppressed is None:
            indices = [
                working_row * self.vocab_size + token_id
                for working_row, token_ids in tokens
                for token_id in token_ids
            ]
            self._suppressed = to_device(indices, torch.int64, self.device)
            self._suppressed_tokens = tokens
        return self._suppressed

    def _record(
        self,
        rows: PenaltyRows | None,
        positions: abc.Sequence[int],
        device_positions: Tensor | None,
        last_token_ids: Tensor | None,
    ) -> Tensor | None:
        if rows is None:
            return None
        assert device_positions is not None
        lengths = [positions[row] for row in rows.batch_rows]
        known = lengths if last_token_ids is None else [length - 1 for length in lengths]
        slots = self.history.record(rows.sequences, known)
        if slots != self._slots or self._slot_index is None:
            self._slots = slots
            self._slot_index = to_device(slots, torch.int64, self.device)
        tokens = self.history.tokens
        if last_token_ids is not None:
            last = last_token_ids.index_select(0, rows.batch_index)
            ends = device_positions.index_select(0, rows.batch_index) - 1
            tokens[self._slot_index, ends] = last.to(tokens.dtype)
            self.history.extend(rows.sequences, lengths)
        return tokens[:, : max(lengths)].index_select(0, self._slot_index)
