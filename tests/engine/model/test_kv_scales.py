"""Test the scales of a float8 KV cache, which are read from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.engine.errors import ModelLoadError
from quire.engine.model.kv_scales import read_kv_scales

from ..models import save_model
from ..worker_driver import load

LAYER = "model.layers.{}.self_attn."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model("llama", tmp_path)
    return tmp_path


def add(folder: Path, **tensors: torch.Tensor) -> torch.Tensor | None:
    """Add tensors to the only file and return the scales read from it afterwards.

    `k0` stands for the K scale of layer 0.
    """
    spec = load(folder).spec
    file = folder / "model.safetensors"
    names = {name: LAYER.format(name[1]) + f"{name[0]}_scale" for name in tensors}
    save_file(
        load_file(file) | {names[name]: tensor for name, tensor in tensors.items()},
        file,
        metadata={"format": "pt"},
    )
    return read_kv_scales(str(folder), spec)


def test_a_plain_checkpoint_has_no_scales(folder: Path) -> None:
    assert add(folder) is None


def test_a_scale_is_given_per_layer_or_per_head(folder: Path) -> None:
    scales = add(folder, k0=torch.tensor(0.5), v1=torch.tensor([2.0, 3.0], dtype=torch.bfloat16))
    assert scales is not None and scales.dtype == torch.float32
    assert scales.tolist() == [[[0.5, 0.5], [1, 1]], [[1, 1], [2, 3]]]


@pytest.mark.parametrize("scale", [[0.0], [-1.0], [float("nan")], [1.0, 2.0, 3.0]])
def test_invalid_scales_are_refused(folder: Path, scale: list[float]) -> None:
    with pytest.raises(ModelLoadError, match="k_scale"):
        add(folder, k0=torch.tensor(scale))


@pytest.mark.parametrize("prefix", ["attn.", "k_proj."])
def test_split_checkpoints_are_read_by_their_index(folder: Path, prefix: str) -> None:
    spec = load(folder).spec
    name = LAYER.format(1) + f"{prefix}k_scale"
    save_file({name: torch.tensor([0.25])}, folder / "scales.safetensors")
    weights = {"model.norm.weight": "absent.safetensors", name: "scales.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    scales = read_kv_scales(str(folder), spec)
    assert scales is not None and scales[1, 0].tolist() == [0.25, 0.25]
    assert scales.sum() == 6.5
