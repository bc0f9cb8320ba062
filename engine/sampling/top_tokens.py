"""The k largest of each row, in one order that depends on nothing but the row."""

from __future__ import annotations

import torch
from torch import Tensor

_LOWEST = -(2**63)


def top_tokens(x: Tensor, k: int, limits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values and token ids [R, k] of the best of `x` [R, V] float32; of equals, the lower id.

    With `limits` [R, 1] int64 from 1 to k, only the first `limits[i]` of row i are exact.

    torch.topk leaves open which of equal values it returns, and that may change with k or with
    the number of rows. So only what lies above the last value is taken from it; those equal to
    that value are sought by id, and both are ranked by (value, id) as one integer.
    """
    last = x.shape[1] - 1
    values, token_ids = x.topk(k, dim=1)
    limit = values[:, -1:] if limits is None else values.gather(1, limits - 1)
    reversed_ids = torch.arange(last, -1, -1, dtype=torch.int32, device=x.device)
    tied = torch.where(x == limit, reversed_ids, -1).topk(k, dim=1).values
    ranks = torch.cat(
        [
            _rank(values, last - token_ids).masked_fill_(values <= limit, _LOWEST),
            _rank(limit, tied.to(torch.int64)).masked_fill_(tied < 0, _LOWEST),
        ],
        dim=1,
    )
    best = ranks.topk(k, dim=1).values
    # The clamp serves rows of NaN, where fewer than k have a rank: any id in the vocabulary does.
    token_ids = last - (best & 0xFFFFFFFF).clamp_(max=last)
    return x.gather(1, token_ids), token_ids


def _rank(values: Tensor, reversed_ids: Tensor) -> Tensor:
    """int64 that order by value, float32, then by reversed id."""
    bits = values.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | reversed_ids
