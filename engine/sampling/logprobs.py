"""Compute the model's log-probabilities at given tokens, and convert them for the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..outputs import TokenLogprobs
from .top_tokens import top_tokens

_CHUNK_ELEMENTS = 1 << 25
"""Logits to work on at a time: bounds their float32 copy to 128 MiB."""


class LogprobTensors(NamedTuple):
    """Log-probabilities at N positions, each with k alternatives, best first; on the device."""

    token_ids: Tensor  # [N] int64
    logprobs: Tensor  # [N] float32
    ranks: Tensor  # [N] int64, 1 + the number of strictly likelier tokens
    top_token_ids: Tensor  # [N, k] int64
    top_logprobs: Tensor  # [N, k] float32
    named_logprobs: Tensor  # [N, m] float32, of the tokens that the rows' requests name


def compute_logprobs(
    logits: Tensor, token_ids: Tensor, k: int, named: Tensor | None = None
) -> LogprobTensors:
    """Return log_softmax(`logits` [N, V]) in float32 at `token_ids` [N], at the token ids `named`
    [N, m] if there are some, and its k best tokens.

    Tokens are ranked by their logits; of equal ones, the lower id comes first. Thus the argmax is
    always the first alternative: it has rank 1 and exactly the same log-probability. The function
    serves sampled tokens and prompt tokens. It works on chunks of rows, to bound the memory that it
    takes beside the logits.
    """
    k = min(k, logits.shape[-1])
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    parts = [
        _compute_chunk(
            logits[start : start + rows],
            token_ids[start : start + rows],
            k,
            None if named is None else named[start : start + rows],
        )
        for start in range(0, max(1, logits.shape[0]), rows)
    ]
    if len(parts) == 1:
        return parts[0]
    return LogprobTensors(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _compute_chunk(
    logits: Tensor, token_ids: Tensor, k: int, named: Tensor | None
) -> LogprobTensors:
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    chosen = token_ids.unsqueeze(1)
    ranks = (logits > logits.gather(1, chosen)).sum(dim=1).add_(1)
    top_token_ids = (
        top_tokens(logits.to(torch.float32), k)[1] if k else token_ids.new_empty((len(logits), 0))
    )
    return LogprobTensors(
        token_ids,
        logprobs.gather(1, chosen).squeeze(1),
        ranks,
        top_token_ids,
        logprobs.gather(1, top_token_ids),
        logprobs[:, :0] if named is None else logprobs.gather(1, named),
    )


def to_token_logprobs(
    tensors: LogprobTensors, num_top: Sequence[int], num_named: Sequence[int] = ()
) -> list[TokenLogprobs]:
    """Convert host tensors to TokenLogprobs; row i keeps its `num_top[i]` best alternatives and its
    `num_named[i]` named tokens, if any row has named some."""
    *columns, named = [tensor.tolist() for tensor in tensors]
    entries = [
        TokenLogprobs(token_id, logprob, rank, top_ids[:count], top[:count])
        for token_id, logprob, rank, top_ids, top, count in zip(*columns, num_top, strict=True)
    ]
    for row, count in enumerate(num_named):
        if count:
            entries[row] = entries[row]._replace(named_logprobs=named[row][:count])
    return entries
