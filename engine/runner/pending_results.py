"""The results of a step, on their way from the device to a ModelRunnerOutput."""

from __future__ import annotations

import torch

from ...kernels.device_copy import Downloads
from ..errors import NonFiniteLogitsError
from ..outputs import RowError, TokenLogprobs
from ..sampling.logprobs import LogprobTensors, to_token_logprobs
from ..sampling.sampler import SamplerOutput, collect_logprobs
from ..step import ModelRunnerOutput
from .pooling import PooledRow
from .prompt_logprobs import PromptChunk
from .row_sampling import RowSamples


class PendingResults:
    """The results of a step whose sampling was launched.

    Their copies to the host begin at once; a call waits for them and makes them plain values.
    `errors` are those known already, by row of the plan.
    """

    def __init__(
        self,
        num_rows: int,
        samples: list[RowSamples],
        chunks: list[PromptChunk],
        pooled: list[PooledRow],
        errors: dict[int, RowError],
    ) -> None:
        self._num_rows = num_rows
        self._errors = errors
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

    def hold_stream(self) -> None:
        """Let what is launched from now on run after the copies, since it may overwrite what they
        read."""
        self._downloads.hold_stream()

    def _pull(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._downloads.add(tensor)

    def _pull_all(self, tensors: LogprobTensors | None) -> LogprobTensors | None:
        return None if tensors is None else LogprobTensors(*map(self._pull, tensors))

    def __call__(self) -> ModelRunnerOutput:
        self._downloads.wait()
        result = ModelRunnerOutput([None] * self._num_rows, {}, {}, self._errors, {}, {}, {})
        for sample in self._samples:
            _collect_samples(result, sample)
        for chunk in self._chunks:
            _collect_prompt(result, chunk)
        for vector in self._pooled:
            _collect_embedding(result, vector)
        return result


def _non_finite(what: str = "logits") -> RowError:
    return RowError(NonFiniteLogitsError.code, f"the model's {what} are not finite")


def _collect_samples(result: ModelRunnerOutput, sample: RowSamples) -> None:
    token_ids: list[int | None] = sample.output.token_ids.tolist()
    logprobs = collect_logprobs(sample.output, sample.batch)
    failed = [index for index, finite in enumerate(sample.output.finite.tolist()) if not finite]
    for index in failed:
        token_ids[index] = None
    if sample.num_drafts:
        firsts = _collect_after_drafts(result, sample, token_ids, logprobs)
    else:
        firsts = list(range(len(sample.rows)))
    for index in firsts:
        result.token_ids[sample.rows[index]] = token_ids[index]
    for index in failed:
        if not sample.num_drafts or sample.num_drafts[index] == 0:
            result.errors[sample.rows[index]] = _non_finite()
    for index, entry in logprobs.items():
        result.logprobs[sample.rows[index]] = entry


def _collect_after_drafts(
    result: ModelRunnerOutput,
    sample: RowSamples,
    token_ids: list[int | None],
    logprobs: dict[int, TokenLogprobs],
) -> list[int]:
    """Collect what was sampled after drafts, and take its entries out of `logprobs`. Returns the
    indices of the other samples."""
    firsts = []
    for index, (row, drafts) in enumerate(zip(sample.rows, sample.num_drafts, strict=True)):
        if drafts == 0:
            firsts.append(index)
            continue
        result.after_drafts.setdefault(row, []).append(token_ids[index])
        if index in logprobs:
            result.logprobs_after_drafts.setdefault(row, []).append(logprobs.pop(index))
    return firsts


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
