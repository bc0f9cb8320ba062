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

from ..attention.layer_traits import traits_of
from .flat_decoder import FlatDecoder, FlatLayer, Linear, Mixture, Mlp, Norm
from .grouped_rows import GroupedEmbedding
from .merged_linear import LinearColumn, MergedLinear


class _Names(NamedTuple):
    """The names of a layer's norms: of the attention's input and update, of the MLP's input and
    update. One is empty if there is no such norm."""

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
    _Names(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
    _Names("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
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
    has_half_factors = _has_half_factors(body, flat[0].rotary_kind)
    return FlatDecoder(body.embed_tokens, body.rotary_emb, flat, norm, factor, has_half_factors)


@torch.no_grad()
def _has_half_factors(body: Any, kind: str | None) -> bool:
    """Whether the rotary embedding gives the factors of angles once: usually it gives them twice,
    one after the other."""
    weight = body.embed_tokens.weight
    positions = torch.tensor([[1, 7]], device=weight.device)
    kinds = () if kind is None else (kind,)
    cos = body.rotary_emb(weight[None, :1], positions, *kinds)[0]
    first, second = cos.chunk(2, dim=-1)
    return not torch.equal(first, second)


def _flat_layer(layer: Any, head_dim: int, window: int | None, has_kinds: bool) -> FlatLayer | None:
    # 1. The layer has exactly the modules of Llama's, with two norms or four.
    names = next(
        (n for n in _NORM_NAMES if _has_children(layer, f"mlp self_attn {' '.join(n)}")), None
    )
    if names is None:
        return None
    attention = layer.self_attn
    qkv, mlp = _qkv(attention, head_dim), _mlp(layer.mlp)
    norms = [_norm(getattr(layer, name)) if name else None for name in names]
    if qkv is None or mlp is None:
        return None
    if any(name and not norm for name, norm in zip(names, norms, strict=True)):
        return None
    input_norm, output_norm, mlp_norm, down_norm = norms
    # 2. Attention has no parameters of its own but sinks, and leaves queries as they are.
    if (traits := traits_of(attention)) is not None and traits.temperature is not None:
        return None
    scale, sinks = getattr(attention, "scaling", None), getattr(attention, "sinks", None)
    if set(attention._parameters) - {"sinks"} or not isinstance(scale, float):
        return None
    qk_norm = None
    if "q_norm" in attention._modules:
        qk_norm = _qk_norm(attention, qkv.num_heads, qkv.num_kv_heads, head_dim)
        if qk_norm is None:
            return None
    return FlatLayer(
        layer_idx=attention.layer_idx,
        num_heads=qkv.num_heads,
        num_kv_heads=qkv.num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=window,
        input_norm=input_norm,
        qkv=qkv.linear,
        qk_norm=None if qk_norm is None else qk_norm.norm,
        output=attention.o_proj,
        mlp_norm=mlp_norm,
        mlp=mlp,
        norms_all_heads=qk_norm is not None and qk_norm.of_all_heads,
        rotary_kind=_kind_of(attention) if has_kinds else None,
        rotates=bool(getattr(attention, "use_rope", True)),
        sinks=None if sinks is None else sinks.detach(),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        output_norm=output_norm,
        down_norm=down_norm,
        update_scale=float(getattr(layer, "residual_multiplier", 1.0)),
        is_fused=qkv.is_fused,
    )


class _Qkv(NamedTuple):
    linear: Linear
    num_heads: int
    num_kv_heads: int
    is_fused: bool


def _qkv(attention: Any, head_dim: int) -> _Qkv | None:
    """Return the product of Q, K and V: a merged one, or Phi-3's, which is one layer."""
    norms = " k_norm q_norm" if "q_norm" in attention._modules else ""
    if _has_children(attention, f"k_proj o_proj q_proj v_proj{norms}"):
        merged = _merged(attention.q_proj, attention.k_proj, attention.v_proj)
        if merged is None:
            return None
        num_heads, num_kv_heads = (size // head_dim for size in merged.sizes[:2])
        return _Qkv(merged.linear, num_heads, num_kv_heads, False)
    if _has_children(attention, f"o_proj qkv_proj{norms}"):
        linear = attention.qkv_proj
        if not isinstance(linear, Linear):
            return None
        num_heads = attention.o_proj.in_features // head_dim
        return _Qkv(linear, num_heads, (linear.out_features // head_dim - num_heads) // 2, True)
    return None


def _mlp(mlp: Any) -> Mlp | Mixture | None:
    """Return a gated MLP, whose gate and up are a merged product or one layer, or a mixture of
    experts."""
    activation = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    name = "act_fn" if hasattr(mlp, "act_fn") else "activation_fn"
    gate_up: Linear | None = None
    is_fused = _has_children(mlp, f"{name} down_proj gate_up_proj")
    if is_fused and isinstance(mlp.gate_up_proj, Linear):
        gate_up = mlp.gate_up_proj
    elif _has_children(mlp, f"{name} down_proj gate_proj up_proj"):
        merged = _merged(mlp.gate_proj, mlp.up_proj)
        gate_up = None if merged is None else merged.linear
    if gate_up is not None and isinstance(activation, nn.Module):
        is_silu = isinstance(activation, nn.SiLU | SiLUActivation)
        return Mlp(gate_up, activation.forward, is_silu, mlp.down_proj, is_fused)
    # transformers gives these attributes to all experts that it can run in several ways.
    is_mixture = any(hasattr(child, "is_transposed") for child in mlp._modules.values())
    return Mixture(mlp) if is_mixture else None


def _kind_of(attention: Any) -> str:
    """Return the kind of a layer, by which the rotary embedding knows it."""
    kind: str = getattr(attention, "layer_type", None) or attention.attention_type
    return kind


class _QkNorm(NamedTuple):
    norm: Norm
    of_all_heads: bool


def _qk_norm(attention: Any, num_heads: int, num_kv_heads: int, head_dim: int) -> _QkNorm | None:
    """Return the norms of Q and K as one, by head; None if they are neither of each head and
    alike, nor of all heads."""
    query_norm, key_norm = _norm(attention.q_norm), _norm(attention.k_norm)
    if query_norm is None or key_norm is None or query_norm.eps != key_norm.eps:
        return None
    of_head = query_norm.weight.shape == key_norm.weight.shape == (head_dim,)
    heads = ((query_norm, num_heads), (key_norm, num_kv_heads))
    if not of_head and any(len(norm.weight) != number * head_dim for norm, number in heads):
        return None
    by_head = [norm.weight.view(-1, head_dim).expand(number, -1) for norm, number in heads]
    return _QkNorm(Norm(torch.cat(by_head), query_norm.eps), not of_head)


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
