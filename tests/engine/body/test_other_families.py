"""Test families beside the proven ones whose layers are flat too: other mixtures of experts, and
other combinations of what a layer may have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from quire.engine.body.body import FlatBody
from quire.engine.devices.cpu.backend import CpuBackend
from quire.engine.devices.cpu.decoder import CpuDecoder

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..models import COMMON, build_model, generate
from ..worker_driver import Driver, make_config, make_prompts, make_sequence

SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = SPARSE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "glm": {"head_dim": 16},  # neighbours rotate; gate and up are one layer
    "exaone4": {"head_dim": 16},  # only updates are normed, and each head of Q and K
    "qwen2_moe": SPARSE | {"num_experts": 4, "shared_expert_intermediate_size": 40},
    "glm4_moe": SHARED | {"head_dim": 16},  # a dense layer before a sparse one
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = build_model(AutoConfig.for_model(family, **COMMON | FAMILIES[family]))
    model.save_pretrained(tmp_path)
    prompts = make_prompts([3, 40])
    expected = [generate(model, prompt, 8) for prompt in prompts]
    for backend, kind in ((CpuBackend(), CpuDecoder), (CudaOnCpuBackend(), FlatBody)):
        driver = Driver.start(make_config(tmp_path), backend)
        assert isinstance(driver.worker._model._body, kind)
        assert driver.run([make_sequence(prompt, 8) for prompt in prompts]) == expected
