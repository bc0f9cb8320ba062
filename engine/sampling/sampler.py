"""Samples one token for every row of a batch, on the device, without waiting for it.

Per row, in this order: the model's log-probabilities are read; masks (structured output,
allowed tokens, min_tokens, bad words), logit bias, repetition, frequency and presence penalties
are applied; then comes the argmax, or temperature, top_k, top_p, min_p and a draw (draws.py).
"""

from __future__ import annotations

from collections import abc
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..outputs import TokenLogprobs
from ..step import SequenceSpec
from .batch import SamplingBatch, SamplingBatchBuilder
from .draws import BestTokens, DrawOps, TorchDraws
from .logprobs import LogprobTensors, compute_logprobs, to_token_logprobs
from .plan import PenaltyRows


class SamplerOutput(NamedTuple):
    """Device tensors, parallel to the batch's rows; the runner copies them to the host.

    If `finite[i]` is False, the row has no valid token: its logits hold NaN or +inf, or nothing
    finite is left once the row's masks are applied.
    """

    token_ids: Tensor  # [R] int64, always in the vocabulary
    finite: Tensor  # [R] bool
    logprobs: LogprobTensors | None  # of the rows `SamplingPlan.logprob_rows`


def collect_logprobs(output: SamplerOutput, batch: SamplingBatch) -> dict[int, TokenLogprobs]:
    """Return the log-probabilities by row, from an `output` that is on the host. Failed rows are
    left out."""
    if output.logprobs is None:
        return {}
    finite = output.finite.tolist()
    plan = batch.plan
    entries = to_token_logprobs(output.logprobs, plan.num_top, plan.num_named)
    pairs = zip(plan.logprob_rows, entries, strict=True)
    return {row: entry for row, entry in pairs if finite[row]}


class Sampler:
    """Samples the steps of one runner: `prepare` a step's rows, call it with their logits, and
    `forget` the sequences that left."""

    def __init__(self, vocab_size: int, device: torch.device, draws: DrawOps | None = None) -> None:
        """`draws` is the device's way to draw, by default plain torch."""
        self._builder = SamplingBatchBuilder(vocab_size, device)
        self._draws = draws or TorchDraws(vocab_size, device)
        self._vocab_size = vocab_size
        bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
        self._bias_of_byte = torch.where(bits & 1 == 1, 0.0, -torch.inf)
        """`[256, 8]`: the logit bias of eight tokens, by the eight bits of their bitmask."""

    def prepare(
        self,
        sequences: abc.Sequence[SequenceSpec],
        positions: abc.Sequence[int] | None = None,
        constrained_rows: abc.Sequence[int] = (),
        banned: abc.Mapping[int, abc.Sequence[int]] = MappingProxyType({}),
        last_token_ids: Tensor | None = None,
    ) -> SamplingBatch:
        """Build the step's batch: see `SamplingBatchBuilder.build`. It costs next to nothing while
        the same sequences sample."""
        return self._builder.build(sequences, positions, constrained_rows, banned, last_token_ids)

    def forget(self, seq_ids: abc.Iterable[int]) -> None:
        """Drop what is kept for sequences that finished or were preempted."""
        self._builder.forget(seq_ids)

    @torch.no_grad()
    def __call__(
        self,
        logits: Tensor,
        batch: SamplingBatch,
        token_bitmask: Tensor | None = None,
        found: BestTokens | None = None,
    ) -> SamplerOutput:
        """Sample from `logits` [R, V] of any float type, which are left as they are.

        `token_bitmask` [C, ceil(V / 32)] int32 of the batch's constrained rows, in order: bit
        i % 32 of word i // 32 allows token i. `found` are the rows' best tokens, if they are known;
        they may be overwritten.
        """
        plan = batch.plan
        if logits.shape != (plan.num_rows, self._vocab_size):
            raise ValueError(
                f"logits are {tuple(logits.shape)}, not {(plan.num_rows, self._vocab_size)}"
            )
        if (token_bitmask is None) != (plan.constrained is None):
            raise ValueError("a token bitmask and constrained rows need one another")
        # 1. The argmax of every row. A maximum that is not finite shows a NaN, a +inf, or a row of
        # nothing but -inf.
        if found is None:
            best, token_ids = self._draws.best(logits)
            finite = best.isfinite()
        else:
            best, token_ids, finite = found
        if plan.working_rows is not None:
            # 2. The working rows with masks, bias and penalties: their argmax counts instead.
            rows = plan.working_rows
            every_row = len(rows) == plan.num_rows
            x = logits if every_row else logits.index_select(0, rows)
            best = best if every_row else best.index_select(0, rows)
            if plan.shaped:
                x = self._shape(x, batch, token_bitmask)
                best, shaped_ids = self._draws.best(x)
                token_ids.index_copy_(0, rows, shaped_ids)
                finite = finite.index_copy(0, rows, best.isfinite()) & finite
            # 3. Draws, in place of the argmax.
            for group in plan.groups:
                assert batch.positions is not None
                drawn = self._draws.draw(x, best, group, batch.positions)
                token_ids.index_copy_(0, group.batch_rows, drawn)
        return SamplerOutput(token_ids, finite, self._logprobs(logits, token_ids, batch))

    def _logprobs(
        self, logits: Tensor, token_ids: Tensor, batch: SamplingBatch
    ) -> LogprobTensors | None:
        plan = batch.plan
        if not plan.logprob_rows:
            return None
        if plan.logprob_index is not None:
            logits = logits.index_select(0, plan.logprob_index)
            token_ids = token_ids.index_select(0, plan.logprob_index)
        return compute_logprobs(logits, token_ids, max(plan.num_top), plan.named)

    def _shape(self, logits: Tensor, batch: SamplingBatch, token_bitmask: Tensor | None) -> Tensor:
        """Return a float32 copy of the working rows [W, V] with masks, bias and penalties
        applied."""
        plan = batch.plan
        num_rows, vocab_size = logits.shape
        # One element more than W * V: padding is written there, so that it needs no branch.
        flat = torch.empty(num_rows * vocab_size + 1, dtype=torch.float32, device=logits.device)
        flat[-1] = 0.0
        x = flat[:-1].view(num_rows, vocab_size)
        x.copy_(logits)
        if plan.constrained is not None and token_bitmask is not None:
            bias = self._bias(token_bitmask)[:, :vocab_size]
            if len(bias) == num_rows:
                x.add_(bias)
            else:
                x.index_add_(0, plan.constrained, bias)
        if plan.masks is not None:
            _forbid(x, plan.masks.working_rows, plan.masks.forbidden)
        if batch.suppressed is not None:
            flat.index_fill_(0, batch.suppressed, -torch.inf)
        if plan.bias is not None:
            flat.scatter_add_(0, plan.bias.indices, plan.bias.values)
        if plan.penalties is not None:
            _penalise(flat, vocab_size, plan.penalties, batch)
        return x

    def _bias(self, bitmask: Tensor) -> Tensor:
        """Turn an int32 bitmask [C, W] into a bias [C, 32 W] float32: 0 for each allowed token,
        -inf for the others.

        It looks up each byte, which on a CPU is several times faster than shifting; and adding a
        bias is faster than a masked fill, which branches at each token.
        """
        octets = bitmask.contiguous().view(torch.uint8).flatten().to(torch.int32)
        return self._bias_of_byte.index_select(0, octets).view(len(bitmask), -1)


def _forbid(x: Tensor, rows: Tensor, forbidden: Tensor) -> None:
    """Set the forbidden tokens [M, V] of these rows of `x` to -inf."""
    x.index_copy_(0, rows, x.index_select(0, rows).masked_fill_(forbidden, -torch.inf))


def _penalise(flat: Tensor, vocab_size: int, rows: PenaltyRows, batch: SamplingBatch) -> None:
    """Apply the penalties to `flat`, the working logits and one element for padding.

    Repetition (Keskar et al. 2019, as in transformers) covers prompt and output: a positive
    logit is divided by it, a negative one multiplied. Frequency and presence (OpenAI) cover the
    output: minus frequency per occurrence, minus presence once. Occurrences of one token write
    the same value, or subtract the same one: their order does not matter.
    """
    assert batch.positions is not None and batch.history is not None
    sink = len(flat) - 1
    step = torch.arange(batch.history.shape[1], device=flat.device)
    lengths = batch.positions.index_select(0, rows.batch_index).unsqueeze(1)
    indices = rows.working_rows * vocab_size + batch.history
    indices.masked_fill_(step >= lengths, sink)
    values = flat[indices]
    values = torch.where(values > 0, values / rows.repetition, values * rows.repetition)
    flat[indices] = values
    indices.masked_fill_(step < rows.num_prompt_tokens, sink)
    amounts = (-rows.frequency).expand_as(indices)
    flat.scatter_add_(0, indices.flatten(), amounts.flatten())
    flat[indices] = flat[indices] - rows.presence
