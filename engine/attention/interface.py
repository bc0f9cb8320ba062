"""The attention function that transformers calls: write K and V to their slots, then attend.

Everything it needs besides query, key and value comes in one argument, `attn_metadata`, which the
runner gives to the model and the model hands down to every layer. The layer's share of the KV
cache is found by `module.layer_idx`, and the device's own attention through `attn_metadata.plan`.
"""

from __future__ import annotations

from collections import abc
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from .latent import LATENT_IMPLEMENTATION, register_latent_attention
from .layer_traits import traits_of
from .metadata import AttentionMetadata, LayerStep

IMPLEMENTATION = "quire_paged"
"""Name under which transformers knows `paged_attention`."""


def register_attention() -> None:
    """Make `IMPLEMENTATION` known to transformers. It has no entry in the mask registry, so that
    models build no mask for it."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    register_latent_attention()


def implementation(*, has_latents: bool) -> str:
    """Return the name of the function that a model's layers call."""
    return LATENT_IMPLEMENTATION if has_latents else IMPLEMENTATION


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
    parts = attn_metadata.parts_of(layer_idx)
    if (traits := traits_of(module)) is not None:
        sliding_window = traits.window
        if traits.temperature is not None:
            assert attn_metadata.positions is not None
            query = traits.temperature.apply(query, attn_metadata.positions)
    tensors = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    options = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": sliding_window,
        "softcap": softcap,
    }
    if len(parts) == 1:
        return _attend(parts[0], tensors, s_aux, options)[None], None
    # Each part has as many of the heads of K and V, and the heads of Q that attend to them.
    pieces = zip(*(tensor.chunk(len(parts), dim=1) for tensor in tensors), strict=True)
    sinks = [None] * len(parts) if s_aux is None else s_aux.chunk(len(parts))
    outputs = [
        _attend(part, piece, sink, options)
        for part, piece, sink in zip(parts, pieces, sinks, strict=True)
    ]
    return torch.cat(outputs, dim=1)[None], None


def _attend(
    step: LayerStep,
    tensors: abc.Sequence[torch.Tensor],
    sinks: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attend with query, key and value `[T, heads, head_dim]` to a place of the cache. The heads of
    the place may have other dimensions: fewer heads that are as much wider, which is the same
    memory, or as many that are wider, which zeros fill up."""
    metadata, cache, kv_scales = step
    (_, num_blocks, heads, size, width), (_, kv_heads, head_dim) = cache.shape, tensors[1].shape
    query, key, value = tensors
    missing = 0
    # (A cache of int8 has wider lines for another reason, and layers that are alike.)
    if (kv_heads, head_dim) != (heads, width) and cache.dtype != torch.int8:
        if kv_heads * head_dim == heads * width:
            cache = cache.view(2, num_blocks, kv_heads, size, head_dim)
        else:
            missing = width - head_dim
            query, key, value = (F.pad(tensor, (0, missing)) for tensor in tensors)
    output = metadata.plan.attend(
        query, key, value, cache, metadata, sinks=sinks, kv_scales=kv_scales, **options
    )
    return output[..., :head_dim] if missing else output
