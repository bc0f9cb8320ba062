"""Embeddings: the final hidden states of a prompt, pooled into one vector over its chunks.

    last           h[N]
    mean           Σ h[i] / N
    weightedmean   Σ i · h[i] / Σ i        (SGPT, arXiv 2202.08904)
    max            max h[i], by component
    classify       logits of the model's classes, of h[N]

h[1] … h[N] are what the language-model head would get, sums are float32. These are the poolings of
sentence-transformers that a causal model can serve.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..devices.steps import HostStep
from ..model.classifier import Scores
from ..request import Pooling


class PooledRow(NamedTuple):
    """The embedding `[hidden_size]`, float32, of a row of the plan that reached the end of its
    prompt."""

    row: int
    vector: torch.Tensor


class Pooler:
    """Keeps the running pooled value of each unfinished prompt, by sequence."""

    def __init__(self, scores: Scores | None = None) -> None:
        """`scores` makes the logits of the pooling "classify"."""
        self._scores = scores
        self._partial: dict[int, torch.Tensor] = {}

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Drop the values of sequences that ended or were preempted."""
        for seq_id in seq_ids:
            self._partial.pop(seq_id, None)

    def __call__(self, host: HostStep, hidden: torch.Tensor) -> list[PooledRow]:
        """Pool a step's hidden states `[T, hidden_size]`, and return the rows that are complete.

        If this raises, nothing of the step is kept, since it is tried again.
        """
        partial: dict[int, torch.Tensor] = {}
        complete = []
        for row in host.pooled_rows:
            sequence = host.sequences[row]
            pooling = sequence.pooling
            assert pooling is not None
            start, length = int(host.starts[row]), int(host.lengths[row])
            first = int(host.query_start_loc[row])
            value = _pool(hidden[first : first + length], start, pooling)
            if start > 0 and pooling not in ("last", "classify"):
                value = _join(self._partial[sequence.seq_id], value, pooling)
            partial[sequence.seq_id] = value
            if not ends_here(host, row):
                continue
            if pooling == "classify":
                assert self._scores is not None  # otherwise the API refuses the request
                value = self._scores(value.to(hidden.dtype)[None])[0]
            complete.append(PooledRow(host.order[row], value / _weight(start + length, pooling)))
        self._partial.update(partial)
        return complete


def ends_here(host: HostStep, row: int) -> bool:
    """Return whether a batch row reaches the end of its prompt in this step."""
    end = int(host.starts[row]) + int(host.lengths[row])
    return end >= host.sequences[row].num_prompt_tokens


def _pool(hidden: torch.Tensor, start: int, pooling: Pooling) -> torch.Tensor:
    """Pool the hidden states `[n, hidden_size]` at positions start …, into float32."""
    if pooling in ("last", "classify"):
        return hidden[-1].to(torch.float32, copy=True)  # a view would keep all of `hidden` alive
    if pooling == "max":
        return hidden.amax(0).float()
    if pooling == "mean":
        return hidden.sum(0, dtype=torch.float32)
    weights = torch.arange(start + 1, start + 1 + len(hidden), device=hidden.device)
    return weights.float() @ hidden.float()


def _join(before: torch.Tensor, chunk: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    return torch.maximum(before, chunk) if pooling == "max" else before + chunk


def _weight(num_tokens: int, pooling: Pooling) -> float:
    """Return the total weight of all positions, by which the pooled sum is divided."""
    if pooling == "mean":
        return num_tokens
    return num_tokens * (num_tokens + 1) / 2 if pooling == "weightedmean" else 1.0
