"""Test experts on the CPU: packed ones against transformers' own, and rows by themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.olmoe import OlmoeConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from quire.engine.body.grouped_linear import GroupedWeight
from quire.engine.devices.cpu.experts import RouterWeight, pack_experts
from quire.engine.devices.cpu.packed_linear import PackedLinear
from quire.engine.devices.cpu.packing import rounded
from quire.kernels.cpu.products import ROWS

from ..models import COMMON, build_model

SHAPES: dict[str, Any] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **COMMON, head_dim=16, moe_intermediate_size=40, num_experts=6, num_experts_per_tok=3
    ),
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: OlmoeConfig(**COMMON, num_experts=6, num_experts_per_tok=2),
    "gpt_oss": lambda: GptOssConfig(
        **COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2
    ),
}


def make_block(name: str) -> tuple[nn.Module, nn.Module]:
    """Return a model's body, and its first mixture of experts."""
    body = build_model(SHAPES[name]()).base_model.requires_grad_(False)
    return body, body.layers[0].mlp


def round_experts(block: nn.Module, quantization: str) -> None:
    """Round the experts' weights as packing does, each row of each expert by itself."""
    experts: Any = block.experts
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name)
        rows = weight.transpose(1, 2) if experts.is_transposed else weight
        made = rounded(rows.flatten(0, 1), quantization)
        assert isinstance(made, GroupedWeight)
        dense = made.dense()[:, : rows.shape[2]].view(rows.shape)
        weight.copy_(dense.transpose(1, 2) if experts.is_transposed else dense)


def output(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    found = block(hidden[None])
    return (found[0] if isinstance(found, tuple) else found).view(hidden.shape)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_experts_equal_those_of_transformers(name: str, quantization: str | None) -> None:
    body, block = make_block(name)
    own = copy.deepcopy(block)
    if quantization is not None:
        round_experts(own, quantization)
    assert pack_experts(body, quantization=quantization) == len(body.layers)
    for parameter in ("gate_up_proj", "down_proj"):
        assert getattr(block.experts, parameter).numel() == 0
    own.experts.config._experts_implementation = "eager"
    # More rows than an item has, fewer, and experts without any.
    hidden = torch.randn(3 * ROWS, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([output(own, part) for part in hidden.split(ROWS)])
    body.set_experts_implementation("quire_experts")
    for rows in (1, 2, len(hidden)):
        actual = output(block, hidden[:rows])
        if quantization is None:
            torch.testing.assert_close(actual, expected[:rows], atol=1e-4, rtol=1e-5)
        assert (actual - expected[:rows]).norm() < 0.03 * expected[:rows].norm()


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_token_gets_the_same_bits_whatever_its_company(
    name: str, quantization: str | None
) -> None:
    body, block = make_block(name)
    pack_experts(body, quantization=quantization)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    together = output(block, hidden)
    for rows in (slice(0, 1), slice(7, 8), slice(11, 30), slice(49, 50)):
        assert torch.equal(output(block, hidden[rows]), together[rows])


@torch.no_grad()
def test_routers_multiply_by_panels() -> None:
    body, block = make_block("qwen3_moe")
    weight = block.gate.weight.detach().clone()
    pack_experts(body, quantization="int4")
    assert isinstance(block.gate.weight, RouterWeight)
    x, bias = torch.randn(4, 5, 32), torch.randn(6)
    for arguments in ((), (bias,)):
        actual = F.linear(x, block.gate.weight, *arguments)
        assert type(actual) is torch.Tensor
        torch.testing.assert_close(actual, F.linear(x, weight, *arguments), atol=1e-5, rtol=1e-5)
    doubled = block.gate.weight.double()
    torch.testing.assert_close(F.linear(x.double(), doubled), F.linear(x.double(), weight.double()))


@torch.no_grad()
def test_a_router_that_is_a_linear_layer_is_not_rounded() -> None:
    body, block = make_block("qwen3_moe")
    weight = block.gate.weight.detach().clone()
    block.gate = nn.Linear(32, 6, bias=False)
    block.gate.weight.copy_(weight)
    pack_experts(body, quantization="int4")
    assert isinstance(block.gate, PackedLinear) and torch.equal(block.gate.weight, weight)


def test_a_body_without_experts_is_left_alone() -> None:
    assert pack_experts(nn.Sequential(nn.Linear(2, 2))) == 0
