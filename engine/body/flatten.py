"""Reads a FlatDecoder out of the modules of a transformers model.

A model qualifies if its modules are named and shaped like Llama's, with the options that FlatLayer
lists. That its code then computes the same is not decided here: the probe proves it
(engine/model/probe.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import SiLUActivation

from .flat_decoder import FlatDecoder, FlatLayer, Linear, Norm
from .grouped_rows import GroupedEmbedding
from .merged_linear import LinearColumn, MergedLinear


class _Names(NamedTuple):
    """The names of a layer's norms: of the attention's input and update, of the MLP's input and
    update. The updates' are empty if they have none."""

    input: str
    output: str
    mlp: str
    down: str


_NORM_NAMES = (
    _Names("input_layernorm", "", "post_attention_layernorm", ""),
    _Names(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
)


def flatten(body: Any, head_dim: int, windows: tuple[int | None, ...]) -> FlatDecoder | None:
    """Return the flat decoder of a body, or None if its modules are not of this shape.

    `windows` are those of the layers. Projections must have been merged (merged_linear.py) and
    not yet been packed.
    """
    if not _has_children(body, "embed_tokens layers norm rotary_emb"):
        return None
    if not isinstance(body.embed_tokens, nn.Embedding | GroupedEmbedding):
        return None
    norm = _norm(body.norm)
    has_kinds = isinstance(getattr(body.rotary_emb, "rope_type", None), dict)
    layers = [
        _flat_layer(layer, head_dim, window, has_kinds)
        for layer, window in zip(body.layers, windows, strict=True)
    ]
    flat = [layer for layer in layers if layer is not None]
    if norm is None or len(flat) < len(layers):
        return None
    # Gemma's embedding multiplies its rows itself, Granite's body does.
    factor = getattr(body.embed_tokens, "embed_scale", 1.0)
    if isinstance(factor, torch.Tensor):
        factor = factor.to(body.embed_tokens.weight.dtype)
    factor = float(factor) * float(getattr(body, "embedding_multiplier", 1.0))
    return FlatDecoder(body.embed_tokens, body.rotary_emb, flat, norm, factor)


def _flat_layer(layer: Any, head_dim: int, window: int | None, has_kinds: bool) -> FlatLayer | None:
    # 1. The layer has exactly the modules of Llama's, with two norms or four.
    names = next(
        (n for n in _NORM_NAMES if _has_children(layer, f"mlp self_attn {_joined(n)}")), None
    )
    if names is None:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    products = _products(attention, mlp, head_dim)
    norms = [_norm(getattr(layer, name)) if name else None for name in names]
    if products is None or any(name and not norm for name, norm in zip(names, norms, strict=True)):
        return None
    input_norm, output_norm, mlp_norm, down_norm = norms
    assert input_norm is not None and mlp_norm is not None
    # 2. Attention has no parameters of its own.
    scale, activation = getattr(attention, "scaling", None), _activation(mlp)
    if list(attention._parameters) or not isinstance(scale, float) or activation is None:
        return None
    qk_norm = None
    if "q_norm" in attention._modules:
        qk_norm = _qk_norm(attention, products.num_heads, products.num_kv_heads, head_dim)
        if qk_norm is None:
            return None
    return FlatLayer(
        layer_idx=attention.layer_idx,
        num_heads=products.num_heads,
        num_kv_heads=products.num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=window,
        input_norm=input_norm,
        qkv=products.qkv,
        qk_norm=qk_norm,
        output=attention.o_proj,
        mlp_norm=mlp_norm,
        gate_up=products.gate_up,
        activation=activation.forward,
        is_silu=isinstance(activation, nn.SiLU | SiLUActivation),
        down=mlp.down_proj,
        rotary_kind=attention.layer_type if has_kinds else None,
        rotates=bool(getattr(attention, "use_rope", True)),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        output_norm=output_norm,
        down_norm=down_norm,
        update_scale=float(getattr(layer, "residual_multiplier", 1.0)),
        is_fused=products.is_fused,
    )


def _joined(names: _Names) -> str:
    return " ".join(names)


class _Products(NamedTuple):
    qkv: Linear
    gate_up: Linear
    num_heads: int
    num_kv_heads: int
    is_fused: bool


def _products(attention: Any, mlp: Any, head_dim: int) -> _Products | None:
    """Return the products of the inputs: merged ones, or Phi-3's, which are one layer each."""
    norms = " k_norm q_norm" if "q_norm" in attention._modules else ""
    if _has_children(attention, f"k_proj o_proj q_proj v_proj{norms}"):
        if not _has_children(mlp, "act_fn down_proj gate_proj up_proj"):
            return None
        qkv = _merged(attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up = _merged(mlp.gate_proj, mlp.up_proj)
        if qkv is None or gate_up is None:
            return None
        num_heads, num_kv_heads = (size // head_dim for size in qkv.sizes[:2])
        return _Products(qkv.linear, gate_up.linear, num_heads, num_kv_heads, False)
    if _has_children(attention, f"o_proj qkv_proj{norms}"):
        if not _has_children(mlp, "activation_fn down_proj gate_up_proj"):
            return None
        qkv, gate_up = attention.qkv_proj, mlp.gate_up_proj
        if not isinstance(qkv, Linear) or not isinstance(gate_up, Linear):
            return None
        num_heads = attention.o_proj.in_features // head_dim
        num_kv_heads = (qkv.out_features // head_dim - num_heads) // 2
        return _Products(qkv, gate_up, num_heads, num_kv_heads, True)
    return None


def _activation(mlp: Any) -> nn.Module | None:
    found = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    return found if isinstance(found, nn.Module) else None


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
    """Whether the module's children have exactly these names, but for dropouts."""
    children = [n for n, child in module._modules.items() if not isinstance(child, nn.Dropout)]
    return sorted(children) == sorted(names.split())


@torch.no_grad()
def _norm(module: nn.Module) -> Norm | None:
    """Return an RMSNorm, whose factor is its weight, or as in Gemma 1 + its weight: whichever gives
    what the module gives for a row. None if neither does."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if list(module._parameters) != ["weight"] or weight is None or not isinstance(eps, float):
        return None
    weight = weight.detach()
    row = torch.linspace(-1.0, 2.0, weight.numel(), device=weight.device).to(weight.dtype)
    found = module(row[None])[0].float()
    tolerance = 4 * torch.finfo(weight.dtype).eps * float(found.abs().max().clamp_min(1e-6))
    for factor in (weight, 1.0 + weight.float()):
        norm = Norm(factor, eps)
        if float((norm(row) - found).abs().max()) <= tolerance:
            return norm
    return None


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
