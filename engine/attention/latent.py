"""The attention function of layers whose heads share a latent (engine/layers/latent_heads.py).

Their modules hand it queries as they are, and the line that the cache keeps of each token as key.
With the products of the module's `kv_b_proj`, every head's query becomes one for that line:

    q · W_UK c = (W_UKᵀ q) · c        Σ_t p_t W_UV c_t = W_UV Σ_t p_t c_t
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from ..layers.latent_heads import LatentHeads
from .metadata import AttentionMetadata

LATENT_IMPLEMENTATION = "quire_latent"
"""Name under which transformers knows `latent_attention`."""


class HeadProducts(Protocol):
    """The products with W_UK and W_UV of each head of one layer."""

    heads: LatentHeads

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Compute W_UKᵀ q: `[num_heads, T, nope_dim]` → `[num_heads, T, rank]`."""

    def expand(self, latents: torch.Tensor) -> torch.Tensor:
        """Compute W_UV c: `[num_heads, T, rank]` → `[num_heads, T, value_dim]`."""


def register_latent_attention() -> None:
    """Make `LATENT_IMPLEMENTATION` known to transformers, without an entry for masks."""
    AttentionInterface.register(LATENT_IMPLEMENTATION, latent_attention)


def absorbed_queries(products: HeadProducts, query: torch.Tensor) -> torch.Tensor:
    """Return the queries for latents: `[num_heads, T, nope_dim + rope_dim]` → `[T, num_heads,
    rank + rope_dim]`."""
    rank, rope_dim, nope_dim, _ = products.heads
    absorbed = query.new_empty(query.shape[1], query.shape[0], rank + rope_dim)
    absorbed[..., :rank] = products.absorb(query[..., :nope_dim]).transpose(0, 1)
    absorbed[..., rank:] = query[..., nope_dim:].transpose(0, 1)
    return absorbed


def latent_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attn_metadata: AttentionMetadata,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend for one layer of a transformers model.

    query `[1, num_heads, T, nope_dim + rope_dim]`, key `[1, 1, T, rank + rope_dim]` → `[1, T,
    num_heads, value_dim]`. `value` is part of `key`. The probe at load has seen all other
    arguments; they change nothing here.
    """
    products: HeadProducts = module.kv_b_proj  # type: ignore[assignment]
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    metadata, cache, _scales = attn_metadata.of_layer(layer_idx)
    latents = metadata.plan.attend_latents(
        absorbed_queries(products, query[0]),
        key[0, 0],
        cache,
        metadata,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        value_width=products.heads.rank,
    )
    return products.expand(latents.transpose(0, 1)).transpose(0, 1)[None], None
