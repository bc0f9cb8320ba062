"""Reads a FlatDecoder out of the modules of a transformers model.

A model qualifies if its modules are named and shaped like Llama's, with optional norms of Q and K
(as in Qwen3) and biases (as in Qwen2). That its code then computes the same is not decided here:
the probe proves it (engine/model/probe.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from .flat_decoder import FlatDecoder, FlatLayer, Norm
from .merged_linear import LinearColumn, MergedLinear


def flatten(body: Any, head_dim: int, windows: tuple[int | None, ...]) -> FlatDecoder | None:
    """Return the flat decoder of a body, or None if its modules are not of this shape.

    `windows` are those of the layers. Projections must have been merged (merged_linear.py) and
    not yet been packed.
    """
    if not _has_children(body, "embed_tokens layers norm rotary_emb"):
        return None
    if type(body.embed_tokens) is not nn.Embedding:
        return None
    norm = _norm(body.norm)
    layers = [
        _flat_layer(layer, head_dim, window)
        for layer, window in zip(body.layers, windows, strict=True)
    ]
    flat = [layer for layer in layers if layer is not None]
    if norm is None or len(flat) < len(layers):
        return None
    return FlatDecoder(body.embed_tokens, body.rotary_emb, flat, norm)


def _flat_layer(layer: Any, head_dim: int, window: int | None) -> FlatLayer | None:
    # 1. The layer has exactly the modules of Llama's, with or without norms of Q and K.
    if not _has_children(layer, "input_layernorm mlp post_attention_layernorm self_attn"):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    projections = "k_proj o_proj q_proj v_proj"
    with_norms = _has_children(attention, f"k_norm q_norm {projections}")
    if not (with_norms or _has_children(attention, projections)):
        return None
    if not _has_children(mlp, "act_fn down_proj gate_proj up_proj"):
        return None
    # 2. Projections are merged, norms are RMSNorms, and attention has no parameters of its own.
    qkv = _merged(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up = _merged(mlp.gate_proj, mlp.up_proj)
    input_norm, mlp_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
    if qkv is None or gate_up is None or input_norm is None or mlp_norm is None:
        return None
    scale = getattr(attention, "scaling", None)
    if list(attention._parameters) or not isinstance(scale, float):
        return None
    num_heads, num_kv_heads = (size // head_dim for size in qkv.sizes[:2])
    qk_norm = None
    if with_norms:
        qk_norm = _qk_norm(attention, num_heads, num_kv_heads, head_dim)
        if qk_norm is None:
            return None
    return FlatLayer(
        layer_idx=attention.layer_idx,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=window,
        input_norm=input_norm,
        qkv=qkv.linear,
        qk_norm=qk_norm,
        output=attention.o_proj,
        mlp_norm=mlp_norm,
        gate_up=gate_up.linear,
        activation=mlp.act_fn.forward,
        is_silu=isinstance(mlp.act_fn, nn.SiLU | SiLUActivation),
        down=mlp.down_proj,
    )


def _qk_norm(attention: Any, num_heads: int, num_kv_heads: int, head_dim: int) -> Norm | None:
    """Return the norms of Q and K as one, by head; None if they are not per head and alike."""
    query_norm, key_norm = _norm(attention.q_norm), _norm(attention.k_norm)
    if query_norm is None or key_norm is None or query_norm.eps != key_norm.eps:
        return None
    if not query_norm.weight.shape == key_norm.weight.shape == (head_dim,):
        return None
    by_head = (query_norm.weight.expand(num_heads, -1), key_norm.weight.expand(num_kv_heads, -1))
    return Norm(torch.cat(by_head), query_norm.eps)


def _has_children(module: nn.Module, names: str) -> bool:
    """Whether the module's children have exactly these names."""
    return sorted(module._modules) == sorted(names.split())


def _norm(module: nn.Module) -> Norm | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if list(module._parameters) != ["weight"] or weight is None or not isinstance(eps, float):
        return None
    return Norm(weight.detach(), eps)


def _merged(*columns: nn.Module) -> MergedLinear | None:
    """Return the product whose columns these layers are, all of them and in this order."""
    found = None
    for index, column in enumerate(columns):
        if not isinstance(column, LinearColumn) or column.index != index:
            return None
        if found is not None and column.merged is not found:
            return None
        found = column.merged
    return found if found is not None and len(found.sizes) == len(columns) else None
