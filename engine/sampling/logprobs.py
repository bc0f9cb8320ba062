"""Log-probabilities of the model at given tokens, and their form on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..outputs import TokenLogprobs
from .top_tokens import top_tokens

_CHUNK_ELEMENTS = 1 << 25  # bounds the float32 copy: 128 MiB


class LogprobTensors(NamedTuple):
    """N positions; k alternatives each, best first. Still on the device that made them."""

    token_ids: Tensor  # [N] int64
    logprobs: Tensor  # [N] float32
    ranks: Tensor  # [N] int64, 1 + the number of strictly likelier tokens
    top_token_ids: Tensor  # [N, k] int64
    top_logprobs: Tensor  # [N, k] float32


def compute_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> LogprobTensors:
    """log_softmax in float32 of `logits` [N, V], read at `token_ids` [N], with the k best.

    Tokens are ranked by their logits, of equals the lower id first, so that an argmax is always
    the first alternative: it has rank 1 and exactly that log-probability. Serves sampled tokens
    and prompt tokens alike. Works through the rows in pieces, so that the memory beyond the
    logits is bounded.
    """
    k = min(k, logits.shape[-1])
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    parts = [
        _compute_chunk(logits[start : start + rows], token_ids[start : start + rows], k)
        for start in range(0, max(1, logits.shape[0]), rows)
    ]
    if len(parts) == 1:
        return parts[0]
    return LogprobTensors(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _compute_chunk(logits: Tensor, token_ids: Tensor, k: int) -> LogprobTensors:
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
    )


def to_token_logprobs(tensors: LogprobTensors, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Rows of host tensors as TokenLogprobs; row i keeps its `num_top[i]` best alternatives."""
    columns = [tensor.tolist() for tensor in tensors]
    return [
        TokenLogprobs(token_id, logprob, rank, top_ids[:count], top[:count])
        for token_id, logprob, rank, top_ids, top, count in zip(*columns, num_top, strict=True)
    ]
