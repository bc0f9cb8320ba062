"""Layers whose heads share a latent, as modules of transformers that attend to the latents.

transformers' modules compute a latent and rotated numbers of each token, and call a method of their
own, `expand_kv`, which makes keys and values of all heads from them. `bind_latents` replaces that
method by one that leaves them as they are, and `kv_b_proj`, whose product it is, by the same weight
as the products that attention/latent.py needs. Everything else stays transformers' code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..attention.latent import absorbed_queries
from ..errors import UnsupportedModelError
from ..layers.latent_heads import LatentHeads
from .grouped_linear import GroupedLinear

_METHOD = "expand_kv"
"""The method's name in all families of transformers."""


class LatentProjection(nn.Module):
    """A `kv_b_proj`, which makes keys and values of latents, and its products for each head.
    Implements HeadProducts, which states the contract."""

    def __init__(self, linear: nn.Linear | GroupedLinear, heads: LatentHeads) -> None:
        """Take over the weight of `linear`; a grouped one is made dense. Raises
        UnsupportedModelError if it has other numbers, or a bias."""
        super().__init__()
        self.heads = heads
        shape = heads.nope_dim + heads.value_dim, heads.rank
        if linear.out_features % shape[0] or linear.in_features != shape[1]:
            raise UnsupportedModelError(
                f"a kv_b_proj has {linear.in_features} × {linear.out_features} numbers, which are "
                f"not those of heads of {heads.nope_dim} and {heads.value_dim}"
            )
        if linear.bias is not None:
            raise UnsupportedModelError("its kv_b_proj adds a bias to keys and values")
        weight = linear.weight.detach().view(-1, *shape)
        self.weight = nn.Parameter(weight, requires_grad=False)
        """`[num_heads, nope_dim + value_dim, rank]`."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Return keys and values of all heads, as transformers' own layer does: `[..., rank]` →
        `[..., num_heads * (nope_dim + value_dim)]`."""
        return F.linear(latents, self.weight.flatten(0, 1))

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        return torch.bmm(query, self.weight[:, : self.heads.nope_dim])

    def expand(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.bmm(latents, self.weight[:, self.heads.nope_dim :].mT)


def bind_latents(body: nn.Module, heads: LatentHeads, num_layers: int) -> None:
    """Let the layers below a transformers model's body hand latents to the attention function.
    Raises UnsupportedModelError if they are not `num_layers` layers that are known."""
    found = 0
    for module in body.modules():
        linear: Any = getattr(module, "kv_b_proj", None)
        if callable(getattr(type(module), _METHOD, None)) and _is_linear(linear):
            module.kv_b_proj = LatentProjection(linear, heads)
            setattr(module, _METHOD, _keep)
            found += 1
    if found != num_layers:
        raise UnsupportedModelError(
            f"{found} of its {num_layers} layers with latent attention are of a known kind"
        )


def _is_linear(module: Any) -> bool:
    return type(module) is nn.Linear or isinstance(module, GroupedLinear)


def _keep(latents: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for `expand_kv`: `[1, 1, T, rank]` and `[1, 1, T, rope_dim]` → the keys, which are
    both, and the values."""
    return torch.cat((latents, rotated), dim=-1), latents


def try_latents(
    module: Any, query: torch.Tensor, key: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, float]:
    """Attend causally in plain torch, and compare with transformers' own keys and values.

    `module` is bound; query `[1, num_heads, T, nope_dim + rope_dim]`, key `[1, 1, T, rank +
    rope_dim]` → `[1, T, num_heads, value_dim]`, and the relative difference of the scores and of
    the outputs, added up.
    """
    products: LatentProjection = module.kv_b_proj
    rank = products.heads.rank
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # 1. As transformers does it: keys and values of each head.
    keys, values = getattr(type(module), _METHOD)(module, key[..., :rank], key[..., rank:])
    expected = (query @ keys.mT)[0]
    # 2. As the engine does it: every head attends to the same lines.
    absorbed = absorbed_queries(products, query[0]).transpose(0, 1)
    scores = absorbed @ key[0, 0].mT
    hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    weights = (scores * scale).float().masked_fill(hidden, float("-inf")).softmax(-1).to(key.dtype)
    output = products.expand(weights @ key[0, 0, :, :rank])
    difference = _difference(scores, expected) + _difference(output, weights @ values[0])
    return output.transpose(0, 1)[None], difference


def _difference(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative difference; 0 on the meta device, where nothing has a value."""
    if tensor.is_meta:
        return 0.0
    return float((tensor - expected).float().norm()) / (float(expected.float().norm()) or 1.0)
