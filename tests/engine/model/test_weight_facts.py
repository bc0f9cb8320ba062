"""Test what is told of weights that are going to be rounded against what they then take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quire.engine.devices.cpu.backend import CpuBackend
from quire.engine.devices.cpu.decoder import CpuDecoder
from quire.engine.devices.cpu.experts import PackedExperts
from quire.engine.devices.cpu.packed_linear import PackedLinear
from quire.engine.devices.cpu.packing import PackedWeight
from quire.engine.model.loader import load_model
from quire.kernels.cpu.integer.products import IntegerWeight

from ..models import save_model
from ..worker_driver import make_config


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_rounded_weights_and_experts(
    family: str, quantization: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[PackedWeight] = []
    for packed, names in ((PackedLinear, ("packed",)), (PackedExperts, ("up", "down"))):
        original = packed.__init__

        def init(
            self: Any, *args: Any, names: Any = names, original: Any = original, **kw: Any
        ) -> None:
            original(self, *args, **kw)
            made.extend(getattr(self, name) for name in names)

        monkeypatch.setattr(packed, "__init__", init)
    save_model(family, tmp_path)
    model = load_model(
        make_config(tmp_path, quantization=quantization, dtype="float32"), CpuBackend()
    )
    facts, body = model.weights, model._body
    assert isinstance(body, CpuDecoder)
    made += [*body._layers.qkv, *body._layers.output]
    plain = load_model(make_config(tmp_path, dtype="float32"), CpuBackend()).weights
    rounded = [weight for weight in made if isinstance(weight, IntegerWeight)]
    saved = sum(4 * len(weight.factors) * weight.depth - weight.num_bytes for weight in rounded)
    assert len(rounded) > 4 and plain.num_bytes - facts.num_bytes == saved
    assert quantization in facts.computed_format and facts.num_parameters == plain.num_parameters
