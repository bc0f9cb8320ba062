"""Sampling a step's rows: all at once, or one by one if that raises."""

from __future__ import annotations

import logging
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from ...kernels.device_copy import to_device
from ..devices.steps import DeviceStep, HostStep, ModelOutput
from ..errors import StepFailedError
from ..outputs import RowError
from ..sampling.batch import SamplingBatch
from ..sampling.draws import BestTokens
from ..sampling.sampler import Sampler, SamplerOutput
from ..step import SamplingConstraints, SequenceSpec

logger = logging.getLogger("quire.engine")


class SamplingRows(NamedTuple):
    """R rows to sample.

    `rows` are their indices in the step's plan, `positions` those that the sampled tokens will have
    in their sequences, `last_token_ids` `[R]` int64 the tokens before them, on the device. A row of
    the plan with drafts stands here once for each token that it samples; `num_drafts[i]` is how
    many drafts precede the one that row i samples. It is empty if no row has drafts.
    """

    rows: list[int]
    num_drafts: list[int]
    sequences: list[SequenceSpec]
    positions: list[int]
    logits: torch.Tensor
    last_token_ids: torch.Tensor
    best: BestTokens | None = None
    """The likeliest tokens, if the device has found them already."""

    def only(self, index: int) -> SamplingRows:
        """Return one of the rows by itself."""
        return SamplingRows(
            [self.rows[index]],
            self.num_drafts[index : index + 1],
            [self.sequences[index]],
            [self.positions[index]],
            self.logits[index, None],
            self.last_token_ids[index, None],
        )


class RowSamples(NamedTuple):
    """What was sampled for these rows of a step's plan. `num_drafts` is that of SamplingRows."""

    rows: list[int]
    num_drafts: list[int]
    sequences: list[SequenceSpec]
    batch: SamplingBatch
    output: SamplerOutput


def sample_rows(
    sampler: Sampler,
    rows: SamplingRows,
    constraints: SamplingConstraints,
    errors: dict[int, RowError],
) -> list[RowSamples]:
    """Sample all rows at once. Should that raise, sample each by itself, so that only the offender
    fails: it is added to `errors`, by row of the plan.

    Raises if there are several and all fail, since then the fault is not a row's.
    """
    try:
        return [_sample(sampler, rows, constraints)]
    except Exception as error:
        if _is_fault_of_device(error):
            raise
        if len(rows.rows) == 1:
            logger.exception("sampling request %s failed", rows.sequences[0].request_id)
            message = "its row raised in the sampler"
            errors[rows.rows[0]] = RowError(StepFailedError.code, message)
            return []
        singles = [
            sample_rows(sampler, rows.only(index), constraints, errors)
            for index in range(len(rows.rows))
        ]
        samples = list(chain.from_iterable(singles))
        if not samples:
            raise
        return samples


def _sample(sampler: Sampler, rows: SamplingRows, constraints: SamplingConstraints) -> RowSamples:
    drafts_before = rows.num_drafts or [0] * len(rows.rows)
    constrained: list[int] = []
    bitmask = None
    if constraints.mask_rows:
        mask_of: dict[int, int] = {}
        for index, row in enumerate(constraints.mask_rows):
            mask_of.setdefault(row, index)
        constrained = [index for index, row in enumerate(rows.rows) if row in mask_of]
    if constrained:
        words = np.frombuffer(constraints.bitmask, dtype=np.int32)
        picks = [mask_of[rows.rows[index]] + drafts_before[index] for index in constrained]
        masks = words.reshape(len(constraints.mask_rows), -1)[picks]
        bitmask = to_device(masks, torch.int32, rows.logits.device)
    banned = {}
    if constraints.banned or constraints.banned_after_drafts:
        for index, (row, drafts) in enumerate(zip(rows.rows, drafts_before, strict=True)):
            after = constraints.banned_after_drafts.get(row)
            if drafts and after:
                banned[index] = after[drafts - 1]
            elif not drafts and row in constraints.banned:
                banned[index] = constraints.banned[row]
    batch = sampler.prepare(
        rows.sequences,
        positions=rows.positions,
        constrained_rows=constrained,
        banned=banned,
        last_token_ids=rows.last_token_ids,
    )
    output = sampler(rows.logits, batch, bitmask, rows.best)
    return RowSamples(rows.rows, rows.num_drafts, rows.sequences, batch, output)


def _is_fault_of_device(error: Exception) -> bool:
    """Return whether an error says nothing about the rows.

    torch has types for most such errors; Triton and the libraries below raise RuntimeErrors that
    name CUDA.
    """
    types = (torch.OutOfMemoryError, torch.AcceleratorError)
    return isinstance(error, types) or (isinstance(error, RuntimeError) and "CUDA" in str(error))


def sampling_rows(host: HostStep, step: DeviceStep, output: ModelOutput) -> SamplingRows:
    """Return the rows of a step that sample, whose forward has this output."""
    rows, sequences, last_ids = host.order, host.sequences, step.input_ids
    if len(host.sampling_rows) < len(step.input_ids) or host.num_drafts:
        picks = host.sampling_rows.tolist()
        rows = [host.order[row] for row in picks]
        sequences = [host.sequences[row] for row in picks]
        last_ids = last_ids[step.logit_indices]
    positions, logits, best = host.sampled_positions, output.logits, output.best
    return SamplingRows(rows, host.num_drafts, sequences, positions, logits, last_ids, best)


def joined(samples: list[RowSamples]) -> tuple[list[SequenceSpec], torch.Tensor]:
    """Return the sequences that were sampled, and their tokens. There are several `samples` if rows
    were sampled one by one."""
    if len(samples) == 1:
        return samples[0].sequences, samples[0].output.token_ids
    sequences = [sequence for sample in samples for sequence in sample.sequences]
    return sequences, torch.cat([sample.output.token_ids for sample in samples])
