"""The body of a Llama-shaped model as one function.

A decode step of a small model spends a third of its time between the products: in module calls,
and in norms, rotations and residual sums made of many small operations. Where a model has the
shape below, its own weights are run with fewer of them:

    x = embed(ids)
    for each layer:   q, k, v = split(qkv(norm(x)))        optionally q, k = norm(q), norm(k)
                      x += o(attend(rotate(q), rotate(k), v))
                      gate, up = split(gate_up(norm(x)));  x += down(act(gate) * up)
    norm(x)

Whether it has is read from its modules, and then proven: `causal_lm` takes the flat body only if
it gives what the model's own forward gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation

from .merged_linear import LinearColumn, MergedLinear


class Norm(NamedTuple):
    """RMSNorm; weight broadcasts to what is normed, over its last dimension."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FlatLayer(NamedTuple):
    """`qk_norm` is its weight by head `[num_heads + num_kv_heads, head_dim]`, and its epsilon."""

    layer_idx: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    input_norm: Norm
    qkv: nn.Linear
    qk_norm: Norm | None
    output: nn.Linear
    mlp_norm: Norm
    gate_up: nn.Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    is_silu: bool
    down: nn.Linear


class Rotation(NamedTuple):
    """Rotary factors of the step, `[T, head_dim]`: head x becomes x * cos + roll(x) * sin, where
    roll moves it by half and sin's first half is negated, which is rotate_half(x) * sin."""

    cos: torch.Tensor
    sin: torch.Tensor


class BodyOps(Protocol):
    """What a flat body does between its products."""

    def add_norm(self, x: torch.Tensor, update: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        """x `[T, hidden_size]` += update, in place → x, normed."""

    def attend(self, layer: FlatLayer, qkv: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """qkv `[T, (num_heads + 2 * num_kv_heads) * head_dim]`: norm and rotate Q and K, store K
        and V, attend → `[T, num_heads * head_dim]`."""

    def activate(self, layer: FlatLayer, gate_up: torch.Tensor) -> torch.Tensor:
        """`[T, 2 * n]` → act(first half) * second half `[T, n]`."""


Attend = Callable[[FlatLayer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A layer's attention: query `[T, num_heads, head_dim]`, key and value `[T, num_kv_heads,
head_dim]` → like query."""


class TorchOps(NamedTuple):
    """BodyOps in plain torch over any attention."""

    attention: Attend

    def add_norm(self, x: torch.Tensor, update: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        if update is not None:
            x += update
        return norm(x)

    def attend(self, layer: FlatLayer, qkv: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        heads = layer.num_heads + layer.num_kv_heads
        qkv = qkv.view(len(qkv), -1, layer.head_dim)
        qk = qkv[:, :heads]
        if layer.qk_norm is not None:
            weight, eps = layer.qk_norm
            qk = F.rms_norm(qk, weight.shape[-1:], None, eps).mul_(weight)
        cos, sin = (part[:, None] for part in rotation)
        qk = torch.addcmul(qk * cos, qk.roll(layer.head_dim // 2, -1), sin)
        query, key = qk[:, : layer.num_heads], qk[:, layer.num_heads :]
        return self.attention(layer, query, key, qkv[:, heads:]).reshape(len(qkv), -1)

    def activate(self, layer: FlatLayer, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return layer.activation(gate) * up


class FlatDecoder(NamedTuple):
    """Made by `flatten`."""

    embedding: nn.Embedding
    rotary: nn.Module
    layers: list[FlatLayer]
    norm: Norm

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, ops: BodyOps
    ) -> torch.Tensor:
        """input_ids and positions `[T]` → hidden states `[T, hidden_size]`."""
        x = F.embedding(input_ids, self.embedding.weight)
        rotation = rotary_factors(self.rotary, x, positions)
        update = None
        for layer in self.layers:
            qkv = layer.qkv(ops.add_norm(x, update, layer.input_norm))
            update = layer.output(ops.attend(layer, qkv, rotation))
            gate_up = layer.gate_up(ops.add_norm(x, update, layer.mlp_norm))
            update = layer.down(ops.activate(layer, gate_up))
        return ops.add_norm(x, update, self.norm)


def rotary_factors(rotary: nn.Module, x: torch.Tensor, positions: torch.Tensor) -> Rotation:
    """Of positions `[T]`, in the type of x, by the model's own rotary embedding."""
    cos, sin = (part[0] for part in rotary(x[None], positions[None]))
    half = cos.shape[-1] // 2
    return Rotation(cos, torch.cat((-sin[:, :half], sin[:, half:]), dim=-1))


def flatten(body: Any, head_dim: int, windows: tuple[int | None, ...]) -> FlatDecoder | None:
    """None where the modules are not those of this shape; `windows` by layer. Call it when
    projections are merged and packed."""
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
    if not _has_children(layer, "input_layernorm mlp post_attention_layernorm self_attn"):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    projections = "k_proj o_proj q_proj v_proj"
    with_norms = _has_children(attention, f"k_norm q_norm {projections}")
    if not (with_norms or _has_children(attention, projections)):
        return None
    if not _has_children(mlp, "act_fn down_proj gate_proj up_proj"):
        return None
    qkv = _merged(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up = _merged(mlp.gate_proj, mlp.up_proj)
    input_norm, mlp_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
    if qkv is None or gate_up is None or input_norm is None or mlp_norm is None:
        return None
    if list(attention._parameters) or not isinstance(
        scale := getattr(attention, "scaling", None), float
    ):
        return None
    num_heads, num_kv_heads = (size // head_dim for size in qkv.sizes[:2])
    qk_norm = None
    if with_norms:
        query_norm, key_norm = _norm(attention.q_norm), _norm(attention.k_norm)
        if query_norm is None or key_norm is None or query_norm.eps != key_norm.eps:
            return None
        if not query_norm.weight.shape == key_norm.weight.shape == (head_dim,):
            return None
        by_head = (
            query_norm.weight.expand(num_heads, -1),
            key_norm.weight.expand(num_kv_heads, -1),
        )
        qk_norm = Norm(torch.cat(by_head), query_norm.eps)
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


def _has_children(module: nn.Module, names: str) -> bool:
    return sorted(module._modules) == sorted(names.split())


def _norm(module: nn.Module) -> Norm | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if list(module._parameters) != ["weight"] or weight is None or not isinstance(eps, float):
        return None
    return Norm(weight.detach(), eps)


def _merged(*columns: nn.Module) -> MergedLinear | None:
    """The product that these are all columns of, in this order."""
    found = None
    for index, column in enumerate(columns):
        if not isinstance(column, LinearColumn) or column.index != index:
            return None
        if found is not None and column.merged is not found:
            return None
        found = column.merged
    return found if found is not None and len(found.sizes) == len(columns) else None
