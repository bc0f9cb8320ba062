"""Find the k largest values of each row, in an order that depends on nothing but the row."""

from __future__ import annotations

import torch
from torch import Tensor

_LOWEST = -(2**63)
"""A rank below all ranks of tokens."""


def top_tokens(x: Tensor, k: int, limits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return values and token ids [R, k] of the k largest of each row of `x` [R, V] float32.

    They are in descending order; of equal values, the one with the lower id comes first. With
    `limits` [R, 1] int64, each from 1 to k, only the first `limits[i]` of row i are exact.

    torch.topk does not specify which of several equal values it returns, and its choice may change
    with k or with the number of rows. Therefore it only supplies the values above the last one that
    counts; the tokens equal to that one are found by their ids.
    """
    # 1. The k largest values; `limit` is the last one that counts.
    last = x.shape[1] - 1
    values, token_ids = x.topk(k, dim=1)
    limit = values[:, -1:] if limits is None else values.gather(1, limits - 1)
    # 2. The k lowest ids of the tokens equal to the limit.
    reversed_ids = torch.arange(last, -1, -1, dtype=torch.int32, device=x.device)
    tied = torch.where(x == limit, reversed_ids, -1).topk(k, dim=1).values
    # 3. The best k of both by (value, lower id), packed into one integer for an exact comparison.
    ranks = torch.cat(
        [
            _rank(values, last - token_ids).masked_fill_(values <= limit, _LOWEST),
            _rank(limit, tied.to(torch.int64)).masked_fill_(tied < 0, _LOWEST),
        ],
        dim=1,
    )
    best = ranks.topk(k, dim=1).values
    # 4. Unpack the ids. Rows with NaN have fewer than k ranks; the clamp gives the others some id
    # in the vocabulary.
    token_ids = last - (best & 0xFFFFFFFF).clamp_(max=last)
    return x.gather(1, token_ids), token_ids


def _rank(values: Tensor, reversed_ids: Tensor) -> Tensor:
    """Pack float32 values and reversed ids into int64 that sort by value, then by reversed id."""
    # Floats sort like their bits as integers once negative ones have their other bits inverted.
    bits = values.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | reversed_ids
