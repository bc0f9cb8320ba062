"""Rotary factors that are looked up must be those that are computed, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import LlamaConfig
from transformers.models.phi3 import Phi3Config

from quire.engine.body import rotary_table
from quire.engine.body.body import FlatBody
from quire.engine.model.loader import load_model

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..models import COMMON, FAMILIES, build_model
from ..worker_driver import make_config

LENGTH = 128
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 32},
}
CONFIGS: dict[str, Any] = {
    kind: lambda kind=kind, values=values: LlamaConfig(
        **COMMON, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **values}
    )
    for kind, values in SCALED.items()
} | {
    "longrope": lambda: Phi3Config(
        **COMMON,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    ),
    "plain": FAMILIES["llama"],
    "a part of each head": FAMILIES["phi3"],
    "two kinds": FAMILIES["gemma3"],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_factors_are_equal_to_the_bit(name: str, dtype: str, tmp_path: Path) -> None:
    """However many positions are asked for at once, and in whatever pieces the table was made."""
    body = load_body(name, tmp_path, dtype=dtype)
    body.expect_positions(LENGTH)
    decoder = body.decoder
    find = decoder.rotations
    assert find is not None
    x = decoder.embedding.weight.new_empty(0)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 33, 200):
        positions = torch.randint(0, LENGTH, (count,), generator=generator)
        for kind in decoder.rotary_kinds:
            expected = decoder.rotation(x, positions, kind)
            for found, wanted in zip(find(positions, kind), expected, strict=True):
                assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def load_body(name: str, folder: Path, **config: Any) -> FlatBody:
    build_model(CONFIGS[name]()).save_pretrained(folder)
    model = load_model(make_config(folder, max_model_len=LENGTH, **config), CudaOnCpuBackend())
    assert isinstance(model._body, FlatBody)
    return model._body


def test_tables_are_made_in_pieces_and_only_as_large_as_they_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = load_body("two kinds", tmp_path)
    whole = rotary_table.make_rotary_table(body.decoder, LENGTH)
    monkeypatch.setattr(rotary_table, "_PIECE", 50)
    pieces = rotary_table.make_rotary_table(body.decoder, LENGTH)
    assert whole is not None and pieces is not None
    for kind in body.decoder.rotary_kinds:
        found = (table(torch.arange(LENGTH), kind).cos for table in (whole, pieces))
        assert torch.equal(*found)
    num_bytes = 2 * 2 * LENGTH * 16 * 4  # two kinds, cosines and sines
    monkeypatch.setattr(rotary_table, "MAX_BYTES", num_bytes)
    assert rotary_table.make_rotary_table(body.decoder, LENGTH) is not None
    caplog.set_level("INFO", "quire.engine")
    assert rotary_table.make_rotary_table(body.decoder, LENGTH + 1) is None
    assert "rotary factors of 129 positions are computed in each step" in caplog.text
