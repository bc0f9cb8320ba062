"""Test experts on CUDA with a reference in place of the kernel: which it runs, how their weights
are laid out, and that a difference is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeSparseMoeBlock,
)

from quire.engine.body.body import FlatBody, HfBody
from quire.engine.devices.cuda.layers.experts import use_experts
from quire.engine.errors import UnsupportedModelError
from quire.engine.model.loader import load_model
from quire.kernels.cuda.tuning import expert_configs

from ..models import FAMILIES, build_model, save_model
from ..worker_driver import make_config
from .cuda_on_cpu import REFERENCES, CudaOnCpuBackend

HIDDEN = 32


def make_body(family: str) -> tuple[Any, nn.Module]:
    """Return a model's body, and its first mixture of experts."""
    body = build_model(FAMILIES[family]()).base_model.requires_grad_(False)
    return body, body.layers[0].mlp


def output(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    found = block(hidden[None])
    return (found[0] if isinstance(found, tuple) else found)[0]


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "olmoe", "qwen3_moe"])
@torch.no_grad()
def test_mixtures_equal_those_of_transformers(family: str) -> None:
    (body, block), (_, own) = make_body(family), make_body(family)
    own.experts.config._experts_implementation = "eager"
    assert use_experts(body, REFERENCES) == len(body.layers)
    hidden = torch.randn(11, HIDDEN, generator=torch.Generator().manual_seed(0))
    for rows in (1, 11):
        torch.testing.assert_close(output(block, hidden[:rows]), output(own, hidden[:rows]))
    # Weights that lie otherwise than the kernel reads them are there once, all others as they were.
    emptied = block.experts.down_proj.numel() == 0
    assert emptied == (family == "gpt_oss")


@torch.no_grad()
def test_every_tile_is_launched_by_the_first_call() -> None:
    seen: list[Any] = []

    def record(*args: Any, config: Any = None, **options: Any) -> torch.Tensor:
        seen.append(config)
        return REFERENCES.run_experts(*args, **options)

    body, block = make_body("qwen3_moe")
    use_experts(body.bfloat16(), REFERENCES._replace(run_experts=record))
    seen.clear()
    hidden = torch.randn(3, 1, 3, HIDDEN).bfloat16()
    for calls in range(3):
        block(hidden[calls])
    assert seen == [None] * 3  # top_k is 2 in the trial at load, too
    block.gate.top_k = 3
    block(hidden[0])
    assert seen[3:] == [*expert_configs(torch.bfloat16), None]


@pytest.mark.parametrize(
    "change",
    [
        lambda experts: setattr(experts, "has_post_expert_norm", True),
        lambda experts: setattr(experts, "has_gate", False),
        lambda experts: setattr(experts, "act_fn", nn.GELU()),
        lambda experts: experts.double(),
    ],
)
def test_other_experts_run_as_transformers_code(change: Callable[[Any], object]) -> None:
    body, block = make_body("qwen3_moe")
    change(block.experts)
    before = body.config._experts_implementation
    assert use_experts(body, REFERENCES) == 0
    assert body.config._experts_implementation == before


def test_a_clamp_that_is_not_known_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    original = GptOssExperts._apply_gate
    monkeypatch.setattr(GptOssExperts, "_apply_gate", lambda self, x: original(self, x) * 1.01)
    body, _ = make_body("gpt_oss")
    assert use_experts(body, REFERENCES) == 0


def test_a_kernel_that_differs_is_refused() -> None:
    def shifted(*args: Any, **options: Any) -> torch.Tensor:
        return REFERENCES.run_experts(*args, **options) * 1.01

    body, _ = make_body("mixtral")
    with pytest.raises(UnsupportedModelError, match="MixtralExperts: quire's kernel does not give"):
        use_experts(body, REFERENCES._replace(run_experts=shifted))


def test_a_body_that_is_not_flat_uses_the_kernel_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.engine.model.causal_lm.flatten_if_equal", lambda *_: None)
    save_model("qwen3_moe", tmp_path)
    model: Any = load_model(make_config(tmp_path), CudaOnCpuBackend())
    assert isinstance(model._body, HfBody)
    experts = [m for m in model._body._model.modules() if isinstance(m, Qwen3MoeExperts)]
    assert experts and all(hasattr(module, "quire_experts") for module in experts)


def test_a_mixture_that_chooses_otherwise_in_each_call_is_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the proof a mixture is played back: what it gives need not be the same twice."""
    original, calls = Qwen3MoeSparseMoeBlock.forward, [0.0]

    def restless(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return original(self, hidden) + calls[0]

    monkeypatch.setattr(Qwen3MoeSparseMoeBlock, "forward", restless)
    save_model("qwen3_moe", tmp_path)
    assert isinstance(load_model(make_config(tmp_path), CudaOnCpuBackend())._body, FlatBody)


def test_a_mixture_with_another_input_is_not_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Qwen3MoeSparseMoeBlock.__call__

    def scaled(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return original(self, 1.01 * hidden)  # before the hooks see it

    save_model("qwen3_moe", tmp_path)
    monkeypatch.setattr(Qwen3MoeSparseMoeBlock, "__call__", scaled)
    assert isinstance(load_model(make_config(tmp_path), CudaOnCpuBackend())._body, HfBody)
