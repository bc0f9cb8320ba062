"""Test which families have a flat body, and that it is used only if it gives the same results."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from quire.engine.body.body import FlatBody
from quire.engine.devices.cpu.decoder import CpuDecoder
from quire.engine.model.causal_lm import CausalLM
from quire.engine.model.loader import load_model

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..models import COMMON, FAMILIES, generate, save_model
from ..worker_driver import Driver, load, make_config, make_sequence

DENSE = {"granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"}
FLAT = DENSE | {"glm4", "mixtral", "olmo2", "olmo3", "olmoe", "qwen3_moe"}
FLAT_ON_GPUS = FLAT | {"gemma2", "gemma3", "gpt_oss"}
"""The CPU has no compiled code for soft caps, sinks and other activations than SiLU."""


def is_flat(model: CausalLM) -> bool:
    """Return whether the model's body was flattened; on the CPU, a flat body is compiled."""
    return isinstance(model._body, CpuDecoder)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_which_families_are_flat(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    assert is_flat(load(tmp_path)) == (family in FLAT)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_which_families_are_flat_on_gpus(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    model = load_model(make_config(tmp_path), CudaOnCpuBackend())
    assert isinstance(model._body, FlatBody) == (family in FLAT_ON_GPUS)


@pytest.mark.parametrize("family", sorted(FLAT))
def test_rounding_to_bfloat16_does_not_prevent_flattening(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    model = load(tmp_path, dtype="bfloat16")
    assert is_flat(model) and model.dtype == torch.bfloat16


def test_rounding_over_eighty_layers_does_not_prevent_flattening(tmp_path: Path) -> None:
    """Rounding over eighty layers adds up to a difference of 5%, which is still accepted."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 80}
    sizes |= {"num_attention_heads": 8}
    config = LlamaConfig(**COMMON | sizes | {"initializer_range": 0.1})
    config.save_pretrained(tmp_path)
    assert is_flat(load(tmp_path, dtype="bfloat16", load_format="dummy", seed=0))


def test_a_model_with_other_norms_is_not_flattened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model with Llama's modules that computes something else keeps its own forward."""
    reference = save_model("llama", tmp_path)
    original = LlamaRMSNorm.forward

    def shifted(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return original(self, hidden) * 1.01

    monkeypatch.setattr(LlamaRMSNorm, "forward", shifted)
    check_not_flat(tmp_path, reference, caplog, None)


def test_a_model_with_other_residuals_is_not_flattened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reference = save_model("llama", tmp_path)
    original = LlamaDecoderLayer.forward

    def scaled(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 0.9 * original(self, hidden, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", scaled)
    check_not_flat(tmp_path, reference, caplog, "differs by")


def check_not_flat(
    folder: Path, reference: Any, caplog: pytest.LogCaptureFixture, message: str | None
) -> None:
    with caplog.at_level(logging.INFO, logger="quire.engine"):
        driver = Driver.start(make_config(folder))
    assert not isinstance(driver.worker._model._body, CpuDecoder)
    if message is not None:
        assert f"transformers' code: one function for all {message}" in caplog.text
    prompt = [5, 6, 7, 8, 9]
    assert driver.run([make_sequence(prompt, 8)]) == [generate(reference, prompt, 8)]


def test_a_model_with_an_extra_module_is_not_flattened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("llama", tmp_path)
    original = LlamaDecoderLayer.__init__

    def with_one_more(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.adapter = nn.Identity()

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", with_one_more)
    assert not is_flat(load(tmp_path))
