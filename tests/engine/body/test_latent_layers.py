"""Test the products that are read out of a layer with latents."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quire.engine.body.grouped_linear import GroupedLinear
from quire.engine.body.latent_layers import LatentProjection
from quire.engine.devices.cpu.packing import rounded
from quire.engine.errors import UnsupportedModelError
from quire.engine.layers.latent_heads import LatentHeads

HEADS = LatentHeads(rank=32, rope_dim=4, nope_dim=6, value_dim=10)


def make_linear(columns: int = 3 * 16, rows: int = 32, bias: bool = False) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(rows, columns, bias=bias)


@pytest.mark.parametrize("is_grouped", [False, True])
@torch.no_grad()
def test_products_are_those_of_keys_and_values(is_grouped: bool) -> None:
    linear: nn.Linear | GroupedLinear = make_linear()
    if is_grouped:
        linear = GroupedLinear(rounded(make_linear().weight, "int8"), None, torch.float32)
    latents, query = torch.randn(5, 32), torch.randn(3, 5, 6)
    keys_and_values = linear(latents)
    projection = LatentProjection(linear, HEADS)
    torch.testing.assert_close(projection(latents), keys_and_values)
    keys, values = keys_and_values.view(5, 3, 16).transpose(0, 1).split([6, 10], dim=-1)
    torch.testing.assert_close(projection.absorb(query) @ latents.T, query @ keys.mT)
    weights = torch.rand(3, 5, 5)
    torch.testing.assert_close(projection.expand(weights @ latents), weights @ values)


@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (make_linear(columns=40), "not those of heads of 6 and 10"),
        (make_linear(rows=31), "not those of heads of 6 and 10"),
        (make_linear(bias=True), "adds a bias"),
    ],
)
def test_other_layers_are_refused(linear: nn.Linear, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        LatentProjection(linear, HEADS)
