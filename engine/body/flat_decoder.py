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
(Phi-4-mini); factors of the embedding and of the updates (Granite, Gemma); norms of the updates
too, a soft cap of the scores and another activation (Gemma 2 and 3).

The weights are a transformers model's own (flatten.py reads them). A decode step of a small model
spends a third of its time between the products: in module calls, and in norms, rotations and
residual sums made of many small operations. The flat decoder has fewer of them, and leaves them to
a device's BodyOps.
"""

from __future__ import annotations

from collections.abc import Callable
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
        rotations = {
            kind: rotary_factors(self.rotary, x, positions, kind) for kind in self.rotary_kinds
        }
        update = None
        for layer in self.layers:
            update = layer.forward(x, update, rotations[layer.rotary_kind], ops)
        return ops.add_norm(x, update, self.norm)

    @property
    def rotary_kinds(self) -> list[str | None]:
        """The kinds of rotations that layers have, in order."""
        return list(dict.fromkeys(layer.rotary_kind for layer in self.layers))

    def with_linears(self, make: Callable[[Linear], Linear]) -> FlatDecoder:
        """Return the same decoder with what `make` makes of each linear layer."""
        layers = [
            layer._replace(
                qkv=make(layer.qkv),
                output=make(layer.output),
                gate_up=make(layer.gate_up),
                down=make(layer.down),
            )
            for layer in self.layers
        ]
        return self._replace(layers=layers)


class FlatLayer(NamedTuple):
    """One decoder layer. `qk_norm` is the norm of Q and K heads, if the model has one, with a
    weight by head `[num_heads + num_kv_heads, head_dim]`."""

    layer_idx: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    input_norm: Norm
    qkv: Linear
    qk_norm: Norm | None
    output: Linear
    mlp_norm: Norm
    gate_up: Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    is_silu: bool
    down: Linear
    rotary_kind: str | None = None
    """The kind of layer for which the rotary embedding is asked, if it knows several."""
    rotates: bool = True
    softcap: float | None = None
    """c, if a score s becomes c · tanh(s / c)."""
    output_norm: Norm | None = None
    """The norm of the attention's update, and `down_norm` of the MLP's, before it is added."""
    down_norm: Norm | None = None
    update_scale: float = 1.0
    """The factor of both updates."""
    is_fused: bool = False
    """Whether `qkv` and `gate_up` are linear layers of the model itself, not merged ones."""

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
        gate_up = self.gate_up(ops.add_norm(x, update, self.mlp_norm))
        return self._scaled(self.down(ops.activate(self, gate_up)), self.down_norm, ops)

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


def rotary_factors(
    rotary: nn.Module, x: torch.Tensor, positions: torch.Tensor, kind: str | None = None
) -> Rotation:
    """Compute the factors of positions `[T]` by the model's own rotary embedding, in the type of
    x; for layers of this kind, if it knows several."""
    kinds = () if kind is None else (kind,)
    cos, sin = (part[0] for part in rotary(x[None], positions[None], *kinds))
    half = cos.shape[-1] // 2
    return Rotation(cos, torch.cat((-sin[:, :half], sin[:, half:]), dim=-1))


class BodyOps(Protocol):
    """The operations of a step between its products."""

    def add_norm(self, x: torch.Tensor, update: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        """Add `update` to x `[T, hidden_size]` in place, if there is one, and return x, normed.
        `update` may be overwritten."""

    def attend(self, layer: FlatLayer, qkv: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Norm and rotate Q and K, store K and V, and attend. qkv `[T, (num_heads + 2 *
        num_kv_heads) * head_dim]` → `[T, num_heads * head_dim]`."""

    def activate(self, layer: FlatLayer, gate_up: torch.Tensor) -> torch.Tensor:
        """Return act(first half) * second half of `[T, 2 * n]`: `[T, n]`."""


AttendHeads = Callable[[FlatLayer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A layer's attention: query `[T, num_heads, head_dim]`, key and value `[T, num_kv_heads,
head_dim]` → like query."""


class TorchOps(NamedTuple):
    """BodyOps in plain torch over any attention."""

    attention: AttendHeads

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
        if layer.rotates:
            cos, sin = (part[:, None] for part in rotation)
            size = cos.shape[-1]
            turned = qk[..., :size]
            turned = torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin)
            qk = torch.cat((turned, qk[..., size:]), dim=-1)
        query, key = qk[:, : layer.num_heads], qk[:, layer.num_heads :]
        return self.attention(layer, query, key, qkv[:, heads:]).reshape(len(qkv), -1)

    def activate(self, layer: FlatLayer, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return layer.activation(gate) * up
