"""The operations of a flat body on CUDA: a layer as a row of Triton launches.

Importing this loads Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...attention.metadata import AttentionMetadata
from ...body.flat_decoder import FlatLayer, Mlp, Norm, Rotation
from .attention import CudaPlan
from .layers.kernels import Kernels


class CudaOps(NamedTuple):
    """BodyOps for one step. Each method is one kernel launch; `attend` takes up to six."""

    kernels: Kernels
    metadata: AttentionMetadata
    plan: CudaPlan

    @classmethod
    def of_step(cls, metadata: AttentionMetadata) -> CudaOps:
        """Make the operations of a step that a CudaPlanner has planned."""
        plan = metadata.plan
        assert isinstance(plan, CudaPlan)
        return cls(plan.kernels, metadata, plan)

    def add_norm(
        self, x: torch.Tensor, update: torch.Tensor | None, norm: Norm | None
    ) -> torch.Tensor:
        if norm is None:
            return x if update is None else x.add_(update)
        if update is None:
            return self.kernels.rms_norm(x, norm.weight, eps=norm.eps)
        self.kernels.fused_add_rms_norm(update, x, norm.weight, eps=norm.eps)
        return update

    def attend(self, layer: FlatLayer, qkv: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        metadata, cache, kv_scales = self.metadata.of_layer(layer.layer_idx)
        key_cache, value_cache = cache
        sizes = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
        norms: dict[str, Any] = {}
        if layer.qk_norm is not None and layer.norms_all_heads:
            self._norm_all_heads(layer, layer.qk_norm, qkv)
        query, key, value = torch.split(qkv.view(len(qkv), -1, layer.head_dim), sizes, dim=1)
        if layer.qk_norm is not None and not layer.norms_all_heads:
            weight, eps = layer.qk_norm
            norms = {"query_weight": weight[0], "key_weight": weight[-1], "eps": eps}
        # A Rotation's sines are negated in its first half.
        half, turned = rotation.cos.shape[-1] // 2, rotation.cos.shape[-1]
        cos, sin = rotation.cos[:, half:], rotation.sin[:, half:]
        if not layer.rotates:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        self.kernels.rope_and_cache(
            query,
            key,
            value,
            key_cache,
            value_cache,
            metadata.slot_mapping,
            cos,
            sin,
            **norms,
            rotary_dim=turned,
            pairs=layer.rotates_pairs,
            out=query,
            kv_scales=kv_scales,
        )
        attended = self.plan.attend_to_cache(
            query,
            cache,
            metadata,
            scale=layer.scale,
            window=layer.window,
            softcap=layer.softcap,
            sinks=layer.sinks,
            kv_scales=kv_scales,
        )
        return attended.view(len(qkv), -1)

    def _norm_all_heads(self, layer: FlatLayer, norm: Norm, qkv: torch.Tensor) -> None:
        """Norm all heads of Q at once, and all of K, in place."""
        heads = [layer.num_heads, layer.num_kv_heads]
        sizes = [number * layer.head_dim for number in heads]
        parts = torch.split(qkv[:, : sum(sizes)], sizes, dim=1)
        for part, weight in zip(parts, torch.split(norm.weight, heads), strict=True):
            self.kernels.rms_norm(part, weight.flatten(), eps=norm.eps, out=part)

    def activate(self, mlp: Mlp, gate_up: torch.Tensor) -> torch.Tensor:
        if mlp.is_silu:
            return self.kernels.silu_and_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return mlp.activation(gate) * up
