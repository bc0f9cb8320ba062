"""Small layers with random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quire.engine.body.flat_decoder import FlatLayer, Mlp, Norm

HEADS, KV_HEADS, HIDDEN = 6, 2, 50


class Rotary(nn.Module):
    """Random rotary angles by position."""

    def __init__(self, head_dim: int, rope_type: str = "default") -> None:
        super().__init__()
        self.rope_type = rope_type
        self.angles = torch.rand(1024, head_dim // 2).repeat(1, 2) * 6

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        angles = self.angles[positions]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def make_norm(*shape: int, dtype: torch.dtype = torch.float32) -> Norm:
    return Norm(1 + torch.randn(shape).to(dtype) / 4, 1e-6)


def make_layer(head_dim: int, has_norm: bool, dtype: torch.dtype) -> FlatLayer:
    norm = partial(make_norm, dtype=dtype)

    def linear(columns: int, rows: int) -> nn.Linear:
        return nn.Linear(columns, rows, bias=has_norm, dtype=dtype)

    return FlatLayer(
        layer_idx=0,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=head_dim,
        scale=0.3,
        window=None,
        input_norm=norm(HIDDEN),
        qkv=linear(HIDDEN, (HEADS + 2 * KV_HEADS) * head_dim),
        qk_norm=norm(HEADS + KV_HEADS, head_dim) if has_norm else None,
        output=linear(HEADS * head_dim, HIDDEN),
        mlp_norm=norm(HIDDEN),
        mlp=Mlp(linear(HIDDEN, 2 * 70), F.silu, True, linear(70, HIDDEN)),
    )


def normed_updates(_: object) -> dict[str, Any]:
    """Return the norms of a layer that norms its updates."""
    return {"output_norm": make_norm(HIDDEN), "down_norm": make_norm(HIDDEN)}
