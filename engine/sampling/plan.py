"""How each row of a batch is sampled, as tensors made only for the parameters in use.

There are three levels of rows: the *batch* rows [0, R) of the logits; the *working* rows [0, W),
which need more than an argmax of the logits and are copied to float32; and groups of working rows
that are drawn by the same operations. A row's group follows from its own parameters only, so its
sample does not depend on the rest of the batch.
"""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.device_copy import to_device
from ..sampling_params import SamplingParams
from ..step import SequenceSpec

MAX_CANDIDATES = 1024
"""Up to this top_k, the k best tokens are picked first, and only they are filtered and drawn."""
_OFF_TOP_P = 2.0  # no share of the mass reaches 2


class DrawGroup(NamedTuple):
    """G rows that are drawn alike. Columns are [G, 1]; None if no row of the group uses them."""

    batch_rows: Tensor  # [G] int64
    working_rows: Tensor  # [G] int64
    seeds: Tensor  # [G] int64
    temperature: Tensor  # float32
    num_candidates: int  # the largest top_k of a group of candidates, 0 for the whole vocabulary
    top_k: Tensor | None  # int64, the vocabulary's size where off
    top_p: Tensor | None  # float64, 2 where off
    log_min_p: Tensor | None  # float32, -inf where off

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens of the vocabulary cannot be drawn."""
        return not (self.top_k is self.top_p is self.log_min_p is None)

    def slice(self, start: int, stop: int) -> DrawGroup:
        """Return rows [start, stop) of the group, as views."""

        def part(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[start:stop]

        return DrawGroup(
            self.batch_rows[start:stop],
            self.working_rows[start:stop],
            self.seeds[start:stop],
            self.temperature[start:stop],
            self.num_candidates,
            part(self.top_k),
            part(self.top_p),
            part(self.log_min_p),
        )


class PenaltyRows(NamedTuple):
    """P working rows with penalties; columns are [P, 1]."""

    sequences: list[SequenceSpec]
    batch_rows: list[int]
    batch_index: Tensor  # [P] int64, `batch_rows`
    working_rows: Tensor  # int64
    num_prompt_tokens: Tensor  # int64
    repetition: Tensor  # float32
    presence: Tensor  # float32
    frequency: Tensor  # float32


class Entries(NamedTuple):
    """Single elements of the working logits: flat indices (row · V + token id), and values."""

    indices: Tensor  # [N] int64
    values: Tensor  # [N] float32


class RowMasks(NamedTuple):
    """M working rows, with the tokens that each must not draw."""

    working_rows: Tensor  # [M] int64
    forbidden: Tensor  # [M, V] bool


class MinTokensRow(NamedTuple):
    """A row that may not end before its token at index `end_position`."""

    batch_row: int
    working_row: int
    end_position: int
    stop_ids: tuple[int, ...]


class BadWordsRow(NamedTuple):
    """A row of a request with bad words: some of its steps have tokens that it must not sample."""

    batch_row: int
    working_row: int


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What stays the same while the same sequences sample."""

    num_rows: int
    working_rows: Tensor | None = None
    """[W] int64 batch rows; None if no row needs more than an argmax."""
    groups: tuple[DrawGroup, ...] = ()
    bias: Entries | None = None
    masks: RowMasks | None = None
    penalties: PenaltyRows | None = None
    constrained: Tensor | None = None
    """[C] int64 working rows that have a token bitmask, in the order of the batch."""
    min_tokens: tuple[MinTokensRow, ...] = ()
    bad_words: tuple[BadWordsRow, ...] = ()
    logprob_rows: tuple[int, ...] = ()
    num_top: tuple[int, ...] = ()
    logprob_index: Tensor | None = None
    """`logprob_rows` on the device; None if these are all rows."""
    named: Tensor | None = None
    """[L, m] int64 token ids whose log-probabilities the L `logprob_rows` also want, padded with 0;
    None if none of them names any."""
    num_named: tuple[int, ...] = ()
    """How many of `named` are each row's own; empty if none names any."""

    @property
    def shaped(self) -> bool:
        """Whether a working row's logits are changed before the draw."""
        parts = (self.bias, self.masks, self.penalties, self.constrained)
        return bool(self.min_tokens or self.bad_words) or any(part is not None for part in parts)


def _is_plain(params: SamplingParams) -> bool:
    """Return whether the token is the argmax of the model's own logits."""
    return (
        params.greedy
        and not params.logit_bias
        and params.allowed_token_ids is None
        and not params.bad_words
        and params.min_tokens == 0
        and not params.has_penalties
    )


class PlanMaker:
    """Makes plans, and keeps what is costly to work out for a sequence until it leaves.

    `vocab_size` is the width of the logits.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._plain: dict[int, bool] = {}
        self._forbidden: dict[int, Tensor] = {}

    def forget(self, seq_id: int) -> None:
        """Drop what is kept for a sequence."""
        self._plain.pop(seq_id, None)
        self._forbidden.pop(seq_id, None)

    def make(
        self, sequences: abc.Sequence[SequenceSpec], constrained: tuple[int, ...]
    ) -> SamplingPlan:
        """Make the plan for `sequences`; the rows `constrained`, ascending, have a bitmask."""
        plain = self._plain
        for sequence in sequences:
            if sequence.seq_id not in plain:
                plain[sequence.seq_id] = _is_plain(sequence.sampling_params)
        must_work = set(constrained)
        working = [
            row
            for row, sequence in enumerate(sequences)
            if not plain[sequence.seq_id] or row in must_work
        ]
        params = [sequence.sampling_params for sequence in sequences]
        num_top = [sequence.num_logprobs for sequence in sequences]
        logprob_rows = tuple(row for row, count in enumerate(num_top) if count is not None)
        some = 0 < len(logprob_rows) < len(sequences)
        plan = SamplingPlan(
            len(sequences),
            logprob_rows=logprob_rows,
            num_top=tuple(count for count in num_top if count is not None),
            logprob_index=self._rows(logprob_rows) if some else None,
        )
        named = [params[row].logprob_token_ids for row in logprob_rows]
        if any(named):
            width = max(map(len, named))
            padded = [(*ids, *(0,) * (width - len(ids))) for ids in named]
            plan = replace(
                plan,
                named=to_device(padded, torch.int64, self._device),
                num_named=tuple(map(len, named)),
            )
        if not working:
            return plan
        return replace(
            plan,
            working_rows=self._rows(working),
            groups=self._draw_groups(sequences, working),
            bias=self._bias(params, working),
            masks=self._masks(sequences, working),
            penalties=self._penalties(sequences, working),
            constrained=self._constrained_rows(working, constrained),
            min_tokens=self._min_tokens(sequences, working, constrained),
            bad_words=tuple(
                BadWordsRow(row, index)
                for index, row in enumerate(working)
                if params[row].bad_words
            ),
        )

    def _rows(self, rows: abc.Sequence[int]) -> Tensor:
        return to_device(rows, torch.int64, self._device)

    def _column(self, values: abc.Sequence[float], dtype: torch.dtype) -> Tensor:
        return to_device(values, dtype, self._device).unsqueeze(1)

    def _draw_groups(
        self, sequences: abc.Sequence[SequenceSpec], working: list[int]
    ) -> tuple[DrawGroup, ...]:
        """Split the rows that draw into few candidates, filtered vocabulary, whole vocabulary."""
        members: dict[str, list[int]] = {}
        for index, row in enumerate(working):
            params = sequences[row].sampling_params
            if params.greedy:
                continue
            if 0 < params.top_k <= min(MAX_CANDIDATES, self._vocab_size - 1):
                kind = "candidates"
            elif 0 < params.top_k < self._vocab_size or params.top_p < 1.0:
                kind = "filtered"
            else:
                kind = "whole"
            members.setdefault(kind, []).append(index)
        return tuple(
            self._draw_group(sequences, working, indices, kind == "candidates")
            for kind, indices in members.items()
        )

    def _draw_group(
        self,
        sequences: abc.Sequence[SequenceSpec],
        working: list[int],
        indices: list[int],
        candidates: bool,
    ) -> DrawGroup:
        rows = [working[index] for index in indices]
        params = [sequences[row].sampling_params for row in rows]
        vocab_size = self._vocab_size
        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        top_p = [p.top_p if p.top_p < 1.0 else _OFF_TOP_P for p in params]
        log_min_p = [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params]
        return DrawGroup(
            self._rows(rows),
            self._rows(indices),
            self._rows([sequences[row].seed for row in rows]),
            self._column([p.temperature for p in params], torch.float32),
            max(top_k) if candidates else 0,
            self._column(top_k, torch.int64) if min(top_k) < vocab_size else None,
            self._column(top_p, torch.float64) if min(top_p) < 1.0 else None,
            self._column(log_min_p, torch.float32) if max(log_min_p) > -math.inf else None,
        )

    def _bias(self, params: abc.Sequence[SamplingParams], working: list[int]) -> Entries | None:
        # A dict, so that the last of two values for one token counts, as in JSON.
        entries = [
            (index * self._vocab_size + token_id, value)
            for index, row in enumerate(working)
            for token_id, value in dict(params[row].logit_bias).items()
        ]
        if not entries:
            return None
        indices, values = zip(*entries, strict=True)
        return Entries(self._rows(indices), to_device(values, torch.float32, self._device))

    def _masks(self, sequences: abc.Sequence[SequenceSpec], working: list[int]) -> RowMasks | None:
        indices: list[int] = []
        masks: list[Tensor] = []
        for index, row in enumerate(working):
            seq_id = sequences[row].seq_id
            allowed = sequences[row].sampling_params.allowed_token_ids
            if allowed is None:
                continue
            if seq_id not in self._forbidden:
                mask = torch.ones(self._vocab_size, dtype=torch.bool, device=self._device)
                self._forbidden[seq_id] = mask.index_fill_(0, self._rows(allowed), False)
            indices.append(index)
            masks.append(self._forbidden[seq_id])
        return RowMasks(self._rows(indices), torch.stack(masks)) if indices else None

    def _penalties(
        self, sequences: abc.Sequence[SequenceSpec], working: list[int]
    ) -> PenaltyRows | None:
        indices = [
            index
            for index, row in enumerate(working)
            if sequences[row].sampling_params.has_penalties
        ]
        if not indices:
            return None
        rows = [working[index] for index in indices]
        chosen = [sequences[row] for row in rows]
        params = [sequence.sampling_params for sequence in chosen]
        return PenaltyRows(
            chosen,
            rows,
            self._rows(rows),
            self._column(indices, torch.int64),
            self._column([s.num_prompt_tokens for s in chosen], torch.int64),
            self._column([p.repetition_penalty for p in params], torch.float32),
            self._column([p.presence_penalty for p in params], torch.float32),
            self._column([p.frequency_penalty for p in params], torch.float32),
        )

    def _constrained_rows(self, working: list[int], constrained: tuple[int, ...]) -> Tensor | None:
        if not constrained:
            return None
        index_of = {row: index for index, row in enumerate(working)}
        return self._rows([index_of[row] for row in constrained])

    def _min_tokens(
        self,
        sequences: abc.Sequence[SequenceSpec],
        working: list[int],
        constrained: tuple[int, ...],
    ) -> tuple[MinTokensRow, ...]:
        rows = []
        for index, row in enumerate(working):
            sequence = sequences[row]
            if sequence.has_grammar or row in constrained:
                continue  # its bitmask says when it may end
            min_tokens = sequence.sampling_params.min_tokens
            # An end token outside the vocabulary (a tokenizer's own) cannot be drawn.
            stop_ids = tuple(t for t in sequence.stop_ids if t < self._vocab_size)
            if min_tokens > 0 and stop_ids:
                end_position = sequence.num_prompt_tokens + min_tokens
                rows.append(MinTokensRow(row, index, end_position, stop_ids))
        return tuple(rows)
