"""This is Llama: the body of a decoder-only transformer, flattened into one function.

The architecture is that of arXiv 2302.13971: RMSNorm (arXiv 1910.07467) before each part of a
layer, rotary positions (RoPE, arXiv 2104.09864), and a SwiGLU MLP (arXiv 2002.05202). Each layer
adds two updates to the residual stream x:

    h = rms_norm(x);    x += O · attend(rope(Q h), rope(K h), V h)
    h = rms_norm(x);    x += D · (silu(G h) * U h)

with x = E[ids] before the first layer, and rms_norm(x) after the last. Q, K and V are one product
here (`qkv`), and so are G and U (`gate_up`). Other families have this shape too, with
options of a layer: sliding windows, biases and norms of Q and K (Mistral, Qwen2, Qwen3); layers
that do not rotate (SmolLM3), or by frequencies of their own (Gemma 3), or only a part of a head
(Phi-4-mini), or neighbours instead of halves (GLM-4); factors of the embedding and of the updates
(Granite, Gemma); norms of the updates too, a soft cap of the scores and another activation (Gemma 2
and 3); norms of the updates only, and of all heads of Q and K at once (OLMo 2 and 3); sinks
(gpt-oss); and a mixture of experts as the MLP (Mixtral, Qwen3-MoE, OLMoE, gpt-oss).

The weights are a transformers model's own (flatten.py reads them). A decode step of a small model
spends a third of its time between the products: in module calls, and in norms, rotations and
residual sums made of many small operations. The flat decoder has fewer of them, and leaves them to
a device's BodyOps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .grouped_linear import GroupedLinear
from .grouped_rows import GroupedEmbedding

Linear = nn.Linear | GroupedLinear


class FlatDecoder(NamedTuple):
    """All layers, with the embedding before and the norm after them."""

    embedding: nn.Embedding | GroupedEmbedding
    rotary: nn.Module
    layers: list[FlatLayer]
    norm: Norm
    embedding_scale: float = 1.0
    has_half_factors: bool = False
    """Whether the rotary embedding gives its factors once, for both halves of what they rotate."""
    rotations: Rotations | None = None
    """Where the factors of positions are looked up; without it, `rotary` computes them."""

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, ops: BodyOps
    ) -> torch.Tensor:
        """input_ids and positions `[T]` → hidden states `[T, hidden_size]`."""
        if isinstance(self.embedding, GroupedEmbedding):
            x = self.embedding.rows(input_ids)
        else:
            x = F.embedding(input_ids, self.embedding.weight)
        if self.embedding_scale != 1:
            x *= self.embedding_scale
        find = self.rotations or partial(self.rotation, x)
        rotations = {kind: find(positions, kind) for kind in self.rotary_kinds}
        update = None
        for layer in self.layers:
            update = layer.forward(x, update, rotations[layer.rotary_kind], ops)
        return ops.add_norm(x, update, self.norm)

    @property
    def rotary_kinds(self) -> list[str | None]:
        """The kinds of rotations that layers have, in order."""
        return list(dict.fromkeys(layer.rotary_kind for layer in self.layers))

    def rotation(
        self, x: torch.Tensor, positions: torch.Tensor, kind: str | None = None
    ) -> Rotation:
        """Return the `rotary_factors` of layers of this kind."""
        halves = self.has_half_factors
        return rotary_factors(self.rotary, x, positions, kind, has_half_factors=halves)

    def with_pairs(self) -> FlatDecoder:
        """Return the same decoder, whose layers rotate neighbours."""
        return self._replace(layers=[layer._replace(rotates_pairs=True) for layer in self.layers])


class Mlp(NamedTuple):
    """The gated MLP of a layer: D (act(G h) * U h)."""

    gate_up: Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    is_silu: bool
    down: Linear
    is_fused: bool = False
    """Whether `gate_up` is a linear layer of the model itself, not a merged one."""

    def forward(self, hidden: torch.Tensor, ops: BodyOps) -> torch.Tensor:
        """`[T, hidden_size]` → the same shape."""
        update: torch.Tensor = self.down(ops.activate(self, self.gate_up(hidden)))
        return update


class Mixture(NamedTuple):
    """A mixture of experts in the place of an MLP: the model's own module with its router, whose
    experts a device runs by its kernels."""

    block: nn.Module

    def forward(self, hidden: torch.Tensor, ops: BodyOps | None = None) -> torch.Tensor:
        """`[T, hidden_size]` → the same shape."""
        found = self.block(hidden[None])
        # gpt-oss returns its scores too.
        update: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return update.reshape(hidden.shape)


class FlatLayer(NamedTuple):
    """One decoder layer. `qk_norm` is the norm of Q and K, if the model has one, with a weight by
    head `[num_heads + num_kv_heads, head_dim]`: of each head, or of all heads of Q and all of K
    if it `norms_all_heads`. An update that is normed need not have a norm before it too."""

    layer_idx: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    input_norm: Norm | None
    qkv: Linear
    qk_norm: Norm | None
    output: Linear
    mlp_norm: Norm | None
    mlp: Mlp | Mixture
    norms_all_heads: bool = False
    rotary_kind: str | None = None
    """The kind of layer for which the rotary embedding is asked, if it knows several."""
    rotates: bool = True
    rotates_pairs: bool = False
    """Whether elements 2i and 2i + 1 of a head rotate together, not i and i + n / 2."""
    sinks: torch.Tensor | None = None
    """Logits `[num_heads]` that take part in the softmax and add nothing to the output."""
    softcap: float | None = None
    """c, if a score s becomes c · tanh(s / c)."""
    output_norm: Norm | None = None
    """The norm of the attention's update, and `down_norm` of the MLP's, before it is added."""
    down_norm: Norm | None = None
    update_scale: float = 1.0
    """The factor of both updates."""
    is_fused: bool = False
    """Whether `qkv` is a linear layer of the model itself, not a merged one."""

    def forward(
        self, x: torch.Tensor, update: torch.Tensor | None, rotation: Rotation, ops: BodyOps
    ) -> torch.Tensor:
        """Run the layer on the residual stream x `[T, hidden_size]`, which it changes in place.

        Every update is added to x together with the norm that follows it. So the layer begins by
        adding `update`, the MLP's of the layer before, and returns its own MLP's.
        """
        # Attention: RMSNorm, projections, RoPE and the attention itself, output projection.
        qkv = self.qkv(ops.add_norm(x, update, self.input_norm))
        update = self.output(ops.attend(self, qkv, rotation))
        update = self._scaled(update, self.output_norm, ops)
        # MLP: RMSNorm, projections, SwiGLU, down projection.
        update = self.mlp.forward(ops.add_norm(x, update, self.mlp_norm), ops)
        return self._scaled(update, self.down_norm, ops)

    def _scaled(self, update: torch.Tensor, norm: Norm | None, ops: BodyOps) -> torch.Tensor:
        if norm is not None:
            update = ops.add_norm(update, None, norm)
        return update if self.update_scale == 1 else update.mul_(self.update_scale)


class Norm(NamedTuple):
    """RMSNorm over the last dimension; `weight` broadcasts to its input."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == x.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = self.weight.float()
        return F.rms_norm(x.float(), wide.shape, wide, self.eps).to(x.dtype)


class Rotation(NamedTuple):
    """Rotary factors of the step's tokens, `[T, n]`, for the first n elements of each head.

    Those, h, become h * cos + roll(h) * sin, where roll moves them by n / 2. The sines are negated
    in their first half, so that this is h * cos + rotate_half(h) * sin.
    """

    cos: torch.Tensor
    sin: torch.Tensor


Rotations = Callable[[torch.Tensor, str | None], Rotation]
"""Positions `[T]` and a kind of layers → the factors."""


def rotary_factors(
    rotary: nn.Module,
    x: torch.Tensor,
    positions: torch.Tensor,
    kind: str | None = None,
    *,
    has_half_factors: bool = False,
) -> Rotation:
    """Compute the factors of positions `[T]` by the model's own rotary embedding, for x of any
    shape on its device and in its type; for layers of this kind, if it knows several.
    `has_half_factors` is that of FlatDecoder."""
    kinds = () if kind is None else (kind,)
    cos, sin = (part[0] for part in rotary(x[None], positions[None], *kinds))
    if has_half_factors:
        return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))
    half = cos.shape[-1] // 2
    return Rotation(cos, torch.cat((-sin[:, :half], sin[:, half:]), dim=-1))


class BodyOps(Protocol):
    """The operations of a step between its products."""

    def add_norm(
        self, x: torch.Tensor, update: torch.Tensor | None, norm: Norm | None
    ) -> torch.Tensor:
        """Add `update` to x `[T, hidden_size]` in place, if there is one, and return x, normed if
        there is a norm. `update` may be overwritten."""

    def attend(self, layer: FlatLayer, qkv: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Norm and rotate Q and K, store K and V, and attend. qkv `[T, (num_heads + 2 *
        num_kv_heads) * head_dim]` → `[T, num_heads * head_dim]`."""

    def activate(self, mlp: Mlp, gate_up: torch.Tensor) -> torch.Tensor:
        """Return act(first half) * second half of `[T, 2 * n]`: `[T, n]`."""


AttendHeads = Callable[[FlatLayer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A layer's attention: query `[T, num_heads, head_dim]`, key and value `[T, num_kv_heads,
head_dim]` → like query."""


class TorchOps(NamedTuple):
    """BodyOps in plain torch over any attention."""

    attention: AttendHeads

    def add_norm(
        self, x: torch.Tensor, update: torch.Tensor | None, norm: Norm | None
    ) -> torch.Tensor:
        if update is not None:
            x += update
        return x if norm is None else norm(x)

    def attend(self, layer: FlatLayer, qkv: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        heads, queries = layer.num_heads + layer.num_kv_heads, layer.num_heads
        qkv = qkv.view(len(qkv), -1, layer.head_dim)
        qk = qkv[:, :heads]
        if layer.qk_norm is not None:
            weight, eps = layer.qk_norm
            if layer.norms_all_heads:
                parts = (qk[:, :queries], weight[:queries]), (qk[:, queries:], weight[queries:])
                qk = torch.cat([Norm(one, eps)(x) for x, one in parts], dim=1)
            else:
                qk = F.rms_norm(qk, weight.shape[-1:], None, eps).mul_(weight)
        if layer.rotates:
            qk = _rotated(qk, rotation, pairs=layer.rotates_pairs)
        attended = self.attention(layer, qk[:, :queries], qk[:, queries:], qkv[:, heads:])
        return attended.reshape(len(qkv), -1)

    def activate(self, mlp: Mlp, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return mlp.activation(gate) * up


def _rotated(x: torch.Tensor, rotation: Rotation, *, pairs: bool) -> torch.Tensor:
    """Rotate heads `[T, heads, head_dim]`."""
    cos, sin = (part[:, None] for part in rotation)
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if pairs:  # as halves, and back
        turned = torch.cat((turned[..., ::2], turned[..., 1::2]), dim=-1)
    turned = (turned * cos + turned.roll(size // 2, -1) * sin).to(x.dtype)
    if pairs:
        turned = torch.stack(turned.chunk(2, dim=-1), dim=-1).flatten(-2)
    return torch.cat((turned, rest), dim=-1)
