"""The attention function that transformers calls: write K and V to their slots, then attend.

Everything it needs besides query, key and value comes in one argument, `attn_metadata`, which the
runner gives to the model and the model hands down to every layer. The layer's share of the KV
cache is found by `module.layer_idx`, and the device's own attention through `attn_metadata.plan`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from .metadata import AttentionMetadata

IMPLEMENTATION = "quire_paged"
"""Name under which transformers knows `paged_attention`."""


def register_attention() -> None:
    """Make `IMPLEMENTATION` known to transformers. It has no entry in the mask registry, so that
    models build no mask for it."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attn_metadata: AttentionMetadata,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend for one layer of a transformers model.

    query `[1, num_heads, T, head_dim]`, key and value `[1, num_kv_heads, T, head_dim]`, with any
    strides → `[1, T, num_heads, head_dim]`. `sliding_window`, `softcap` and the sinks `s_aux` are
    as in `AttentionPlan.attend`. The probe at load has seen all other arguments; they change
    nothing here.
    """
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    metadata, cache, kv_scales = attn_metadata.of_layer(layer_idx)
    output = metadata.plan.attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cache,
        metadata,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        kv_scales=kv_scales,
    )
    return output[None], None
