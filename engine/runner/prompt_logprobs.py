"""Log-probabilities of the tokens of a prompt, for rows that ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...kernels.device_copy import to_device
from ..devices.steps import HostStep
from ..model.causal_lm import CausalLM
from ..sampling.logprobs import LogprobTensors, compute_logprobs

PROMPT_LOGIT_ELEMENTS = 1 << 25
"""Maximum number of prompt logits computed at a time: 128 MiB in float32."""


class PromptChunk(NamedTuple):
    """The log-probabilities of one row of the step's plan, `num_top` alternatives a position."""

    row: int
    num_top: int
    logprobs: LogprobTensors


class PromptSpan(NamedTuple):
    """The tokens [begin, end) of a step, all of batch row `row`, and the prompt tokens that follow
    them."""

    row: int
    begin: int
    end: int
    targets: list[int]


def find_spans(host: HostStep, vocab_size: int) -> Iterator[PromptSpan]:
    """Yield the slices in which the prompts' positions are worked through, which bounds the
    memory."""
    size = max(1, PROMPT_LOGIT_ELEMENTS // vocab_size)
    for row, sequence in enumerate(host.sequences):
        if sequence.num_prompt_logprobs is None:
            continue
        start = int(host.starts[row])
        count = min(int(host.lengths[row]), sequence.num_prompt_tokens - 1 - start)
        first = int(host.query_start_loc[row])
        for begin in range(0, count, size):
            end = min(begin + size, count)
            targets = sequence.token_ids[start + 1 + begin : start + 1 + end]
            yield PromptSpan(row, first + begin, first + end, targets)


def prompt_logprobs(model: CausalLM, host: HostStep, hidden: torch.Tensor) -> list[PromptChunk]:
    """Compute the log-probability of each prompt token that follows a computed one. `hidden`
    `[T, hidden_size]` are the step's hidden states."""
    chunks = []
    for row, begin, end, targets in find_spans(host, model.spec.vocab_size):
        num_top = host.sequences[row].num_prompt_logprobs
        assert num_top is not None
        logits = model.logits(hidden[begin:end])
        ids = to_device(targets, torch.int64, hidden.device)
        chunks.append(PromptChunk(host.order[row], num_top, compute_logprobs(logits, ids, num_top)))
    return chunks
