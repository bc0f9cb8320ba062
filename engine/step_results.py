"""A step's results on their way from the device to ModelRunnerOutput."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .errors import NonFiniteLogitsError
from .logprobs import LogprobTensors, to_token_logprobs
from .outputs import ModelRunnerOutput, RowError
from .pooling import PooledRow
from .sampler import SamplerOutput, collect_logprobs
from .sampling_metadata import SamplingBatch


class PromptChunk(NamedTuple):
    """Prompt log-probabilities of one row: `num_top` alternatives at each of its positions."""

    row: int
    num_top: int
    logprobs: LogprobTensors


class RowSamples(NamedTuple):
    """What was sampled for these rows of the scheduler's output."""

    rows: list[int]
    batch: SamplingBatch
    output: SamplerOutput


def to_host(
    samples: list[RowSamples], chunks: list[PromptChunk], pooled: list[PooledRow]
) -> tuple[list[RowSamples], list[PromptChunk], list[PooledRow]]:
    """Bring a step's results to the host: all copies are queued, then waited for once."""
    device = None

    def pull(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal device
        if tensor.device.type == "cpu":
            return tensor
        device = tensor.device
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    def pull_all(tensors: LogprobTensors) -> LogprobTensors:
        return LogprobTensors(*map(pull, tensors))

    pulled = []
    for sample in samples:
        token_ids, finite, logprobs = sample.output
        logprobs = None if logprobs is None else pull_all(logprobs)
        output = SamplerOutput(pull(token_ids), pull(finite), logprobs)
        pulled.append(sample._replace(output=output))
    chunks = [chunk._replace(logprobs=pull_all(chunk.logprobs)) for chunk in chunks]
    pooled = [row._replace(vector=pull(row.vector)) for row in pooled]
    if device is not None:
        torch.cuda.current_stream(device).synchronize()
    return pulled, chunks, pooled


def _non_finite(what: str = "logits") -> RowError:
    return RowError(NonFiniteLogitsError.code, f"the model's {what} are not finite")


def collect_samples(result: ModelRunnerOutput, sample: RowSamples) -> None:
    token_ids, finite = sample.output.token_ids.tolist(), sample.output.finite.tolist()
    for row, token_id, is_finite in zip(sample.rows, token_ids, finite, strict=True):
        if is_finite:
            result.token_ids[row] = token_id
        else:
            result.errors[row] = _non_finite()
    for index, entry in collect_logprobs(sample.output, sample.batch).items():
        result.logprobs[sample.rows[index]] = entry


def collect_prompt(result: ModelRunnerOutput, row: int, chunk: PromptChunk) -> None:
    if chunk.logprobs.logprobs.isnan().any():
        result.errors[row] = _non_finite()
        result.token_ids[row] = None
        result.logprobs.pop(row, None)
        return
    entries = to_token_logprobs(chunk.logprobs, [chunk.num_top] * len(chunk.logprobs.token_ids))
    result.prompt_logprobs.setdefault(row, []).extend(entries)


def collect_embedding(result: ModelRunnerOutput, row: int, pooled: PooledRow) -> None:
    if pooled.vector.isfinite().all():
        result.embeddings[row] = pooled.vector.numpy().astype("<f4").tobytes()
    else:
        result.errors[row] = _non_finite("hidden states")
