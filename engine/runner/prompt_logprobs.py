"""Log-probabilities of the tokens of a prompt, for rows that ask for them."""

from __future__ import annotations

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


def prompt_logprobs(model: CausalLM, host: HostStep, hidden: torch.Tensor) -> list[PromptChunk]:
    """Compute the log-probability of each prompt token that follows a computed one.

    `hidden` `[T, hidden_size]` are the step's hidden states. Positions are worked through in
    slices, which bounds the memory.
    """
    chunks = []
    for row, sequence in enumerate(host.sequences):
        num_top = sequence.num_prompt_logprobs
        if num_top is None:
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
