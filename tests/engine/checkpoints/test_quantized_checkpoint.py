"""Test that quantised safetensors compute what transformers makes of their dequantised weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire.engine.body.body import HfBody
from quire.engine.body.grouped_linear import GroupedLinear
from quire.engine.checkpoints.checkpoint import open_checkpoint
from quire.engine.devices.cpu.backend import CpuBackend
from quire.engine.model.assemble import assemble

from ..models import generate
from ..worker_driver import Driver, load, make_config, make_sequence
from .quantized_files import FORMATS, write_model

PROMPT = [5, 80, 17, 33, 64, 9, 110, 7]
CASES = [
    *(("llama", form) for form in FORMATS),
    ("qwen3", "awq"),
    ("qwen3", "gptq-4"),
    ("qwen3", "packed-8"),
    ("qwen3", "float8-blocks"),
    ("qwen3_moe", "packed-4"),
    ("qwen3_moe", "float8-blocks"),
    ("mixtral", "awq"),
]


class PlainBackend(CpuBackend):
    """A CPU that runs all layers as they are, so that nothing more is rounded."""

    def make_body(self, body: Any, head: Any, flat: Any, **_: Any) -> Any:
        return HfBody(body)


def assembled(folder: Path, *, keep_float8: bool = False) -> Any:
    """Return the transformers model that quire makes of the folder."""
    checkpoint = open_checkpoint(make_config(folder))
    assert checkpoint is not None and checkpoint.load_arguments is None
    config = checkpoint.hf_config()

    def build() -> Any:
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )

    return assemble(
        checkpoint, build, torch.float32, keep_groups=True, keep_float8=keep_float8
    ).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
    return found


def grouped_layers(model: Any) -> list[GroupedLinear]:
    return [module for module in model.modules() if isinstance(module, GroupedLinear)]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_logits_and_text_are_those_of_dequantised_weights(
    tmp_path: Path, family: str, form: str
) -> None:
    expected = write_model(tmp_path, family, FORMATS[form])
    folder = tmp_path / "quantised"
    model = assembled(folder)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-4)
    per_layer = 4 if family in ("qwen3_moe", "mixtral") else 7
    kept = grouped_layers(model)
    assert len(kept) == (2 * per_layer if FORMATS[form].is_kept else 0)
    bits = FORMATS[form].quantization.get("bits", 4 if "-4" in form else 8)
    assert {layer.grouped.bits for layer in kept} <= {bits}
    driver = Driver.start(make_config(folder, dtype="float32"), PlainBackend())
    [tokens] = driver.run([make_sequence(PROMPT, 8)])
    assert tokens == generate(expected, PROMPT, 8)
