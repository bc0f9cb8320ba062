"""Heads whose keys and values are made of one latent: multi-head latent attention.

    latent   c_t = norm(W_DKV x_t)                 `rank` numbers, the same for all heads
    keys     k_t,h = [W_UK,h c_t ; rotated k_t]    `nope_dim` + `rope_dim` numbers
    values   v_t,h = W_UV,h c_t                    `value_dim` numbers

The KV cache keeps c_t and the rotated numbers, which is one KV head whose values are the first
`rank` numbers of its keys. W_UK is multiplied into the queries, and W_UV into the outputs
(DeepSeek-V2, arXiv 2405.04434).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class LatentHeads(NamedTuple):
    """The numbers of each head of a layer with latent attention; all layers have the same."""

    rank: int
    """Numbers of the latent, which are the values in the cache."""
    rope_dim: int
    """Rotated numbers of each query and key."""
    nope_dim: int
    """Numbers of each query and key that are not rotated."""
    value_dim: int
    """Numbers of each head's output."""

    @property
    def width(self) -> int:
        """The numbers that the cache keeps of a token in one layer."""
        return self.rank + self.rope_dim

    @property
    def query_dim(self) -> int:
        """The numbers of a query before W_UK is multiplied into it."""
        return self.nope_dim + self.rope_dim


def read_latents(text: Any) -> LatentHeads | None:
    """Return the heads of a model with latent attention from the configuration of its text part;
    None if it has no such attention. Raises AttributeError if a number is missing."""
    rank: int | None = getattr(text, "kv_lora_rank", None)
    if rank is None:
        return None
    return LatentHeads(rank, text.qk_rope_head_dim, text.qk_nope_head_dim, text.v_head_dim)
