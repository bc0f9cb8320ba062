"""A step's results on their way from the device to ModelRunnerOutput."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from ...kernels.device_copy import Downloads
from ..errors import NonFiniteLogitsError
from ..outputs import ModelRunnerOutput, RowError
from ..sampling.batch import SamplingBatch
from ..sampling.logprobs import LogprobTensors, to_token_logprobs
from ..sampling.sampler import SamplerOutput, collect_logprobs
from ..sequence import Sequence
from .pooling import PooledRow
from .prompt_logprobs import PromptChunk


class RowSamples(NamedTuple):
    """What was sampled for these rows of the scheduler's output."""

    rows: list[int]
    sequences: list[Sequence]
    batch: SamplingBatch
    output: SamplerOutput


class StepResults:
    """The results of a launched step: on their way to the host at once, made plain when called
    for. `errors` are those known already; `mask_errors` those that filling its masks found."""

    def __init__(
        self,
        num_rows: int,
        samples: list[RowSamples],
        chunks: list[PromptChunk],
        pooled: list[PooledRow],
        errors: dict[int, RowError],
        mask_errors: Mapping[int, RowError],
    ) -> None:
        """All copies are queued here, and waited for once, in the call."""
        self._num_rows = num_rows
        self._errors = errors
        self._mask_errors = mask_errors
        self._downloads = Downloads()
        self._samples = [
            sample._replace(
                output=SamplerOutput(
                    self._pull(sample.output.token_ids),
                    self._pull(sample.output.finite),
                    self._pull_all(sample.output.logprobs),
                )
            )
            for sample in samples
        ]
        self._chunks = [
            chunk._replace(logprobs=LogprobTensors(*map(self._pull, chunk.logprobs)))
            for chunk in chunks
        ]
        self._pooled = [row._replace(vector=self._pull(row.vector)) for row in pooled]
        self._downloads.end()

    def _pull(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._downloads.add(tensor)

    def _pull_all(self, tensors: LogprobTensors | None) -> LogprobTensors | None:
        return None if tensors is None else LogprobTensors(*map(self._pull, tensors))

    def __call__(self) -> ModelRunnerOutput:
        self._downloads.wait()
        result = ModelRunnerOutput([None] * self._num_rows, {}, {}, self._errors, {})
        for sample in self._samples:
            _collect_samples(result, sample)
        for row, error in self._mask_errors.items():
            result.errors[row] = error
            result.token_ids[row] = None
        for chunk in self._chunks:
            _collect_prompt(result, chunk)
        for vector in self._pooled:
            _collect_embedding(result, vector)
        return result


def _non_finite(what: str = "logits") -> RowError:
    return RowError(NonFiniteLogitsError.code, f"the model's {what} are not finite")


def _collect_samples(result: ModelRunnerOutput, sample: RowSamples) -> None:
    for row, token_id in zip(sample.rows, sample.output.token_ids.tolist(), strict=True):
        result.token_ids[row] = token_id
    for index in np.flatnonzero(~sample.output.finite.numpy()).tolist():
        row = sample.rows[index]
        result.token_ids[row] = None
        result.errors[row] = _non_finite()
    for index, entry in collect_logprobs(sample.output, sample.batch).items():
        result.logprobs[sample.rows[index]] = entry


def _collect_prompt(result: ModelRunnerOutput, chunk: PromptChunk) -> None:
    row = chunk.row
    if chunk.logprobs.logprobs.isnan().any():
        result.errors[row] = _non_finite()
        result.token_ids[row] = None
        result.logprobs.pop(row, None)
        return
    entries = to_token_logprobs(chunk.logprobs, [chunk.num_top] * len(chunk.logprobs.token_ids))
    result.prompt_logprobs.setdefault(row, []).extend(entries)


def _collect_embedding(result: ModelRunnerOutput, pooled: PooledRow) -> None:
    if pooled.vector.isfinite().all():
        result.embeddings[pooled.row] = pooled.vector.numpy().astype("<f4").tobytes()
    else:
        result.errors[pooled.row] = _non_finite("hidden states")
