"""Log-probabilities of a prompt's own tokens, for rows that ask for them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...kernels.device_copy import to_device
from ..devices.steps import HostStep
from ..model.causal_lm import CausalLM
from ..sampling.logprobs import LogprobTensors, compute_logprobs

PROMPT_LOGIT_ELEMENTS = 1 << 25
"""Logits of prompt tokens are made at most so many at a time: 128 MiB in float32."""


class PromptChunk(NamedTuple):
    """What one row of the scheduler's output brought: `num_top` alternatives a position."""

    row: int
    num_top: int
    logprobs: LogprobTensors


def prompt_logprobs(model: CausalLM, host: HostStep, hidden: torch.Tensor) -> list[PromptChunk]:
    """The log-probability of each prompt token that follows a computed one, from the step's hidden
    states `[T, hidden_size]`. Memory is bounded by working through the positions in slices."""
    chunks = []
    for row, sequence in enumerate(host.sequences):
        num_top = sequence.request.sampling_params.prompt_logprobs
        if num_top is None or sequence.choice != 0:
            continue
        start = int(host.starts[row])
        count = min(int(host.lengths[row]), sequence.num_prompt_tokens - 1 - start)
        first = int(host.query_start_loc[row])
        if count <= 0:
            continue
        ids = sequence.token_ids[start + 1 : start + 1 + count]
        targets = to_device(ids, torch.int64, hidden.device)
        size = max(1, PROMPT_LOGIT_ELEMENTS // model.spec.vocab_size)
        for begin in range(0, count, size):
            end = min(begin + size, count)
            logits = model.logits(hidden[first + begin : first + end])
            logprobs = compute_logprobs(logits, targets[begin:end], num_top)
            chunks.append(PromptChunk(host.order[row], num_top, logprobs))
    return chunks
