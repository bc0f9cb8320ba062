"""Test which adapters are read, and that every other one is refused by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quire.engine.adapters.adapter import Adapter, LinearShape, find_linears
from quire.engine.adapters.peft_config import read_config
from quire.engine.adapters.peft_files import read_adapter
from quire.engine.errors import InvalidRequestError

from .. import models
from ..lora_models import Tensors, change_config, change_tensors, named, save_adapter

MAX_RANK = 16
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def base() -> Any:
    return models.build_model(models.FAMILIES["llama"]())


@pytest.fixture(scope="module")
def saved(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    save_adapter(base, folder, r=4, lora_alpha=6, target_modules=TARGETS)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def linears(base: Any) -> dict[str, LinearShape]:
    ids = torch.tensor([[3, 4, 5]])
    return {
        name: place.shape
        for name, place in find_linears(base.model, "model", lambda: base.model(ids), 3).items()
    }


def read(folder: Path, linears: dict[str, LinearShape], max_rank: int = MAX_RANK) -> Adapter:
    return read_adapter(folder, linears, "model", max_rank)


def test_the_linear_layers_of_a_model_are_found(linears: dict[str, LinearShape]) -> None:
    assert len(linears) == 2 * 7 and "lm_head" not in linears
    assert linears["model.layers.1.self_attn.k_proj"] == (32, 16)
    assert linears["model.layers.0.mlp.up_proj"] == (32, 64)


def test_layers_that_get_a_part_of_the_tokens_or_none_are_not_adapted() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.expert, self.unused = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.shared(x)
            return x + self.expert(x[:, :2]).sum()

    model = Experts()
    found = find_linears(model, "body", lambda: model(torch.ones(1, 3, 4)), 3)
    assert list(found) == ["body.shared"]


def test_weights_are_scaled_and_named_as_in_the_model(
    folder: Path, linears: dict[str, LinearShape]
) -> None:
    adapter = read(folder, linears)
    assert sorted(adapter.weights) == sorted(
        name for name in linears if name.rpartition(".")[2] in TARGETS
    )
    assert adapter.rank == 4
    read_before: Tensors = {}
    change_tensors(folder, lambda tensors: read_before.update(tensors) or tensors)
    name = "model.layers.0.self_attn.q_proj"
    prefix = f"base_model.model.{name}"
    torch.testing.assert_close(
        adapter.weights[name].b, read_before[f"{prefix}.lora_B.weight"] * 1.5
    )
    torch.testing.assert_close(adapter.weights[name].a, read_before[f"{prefix}.lora_A.weight"])


def test_an_adapter_of_the_body_alone_fits_too(
    folder: Path, linears: dict[str, LinearShape]
) -> None:
    whole = read(folder, linears)
    change_tensors(
        folder,
        lambda tensors: {
            name.replace("base_model.model.model.", "base_model.model."): tensor
            for name, tensor in tensors.items()
        },
    )
    bare = read(folder, linears)
    assert bare.weights.keys() == whole.weights.keys()


def test_half_precision_is_read_as_float32(folder: Path, linears: dict[str, LinearShape]) -> None:
    change_tensors(folder, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    weights = read(folder, linears).weights.values()
    assert {part.dtype for weight in weights for part in weight} == {torch.float32}


def test_scalings_and_targets_follow_the_patterns(folder: Path) -> None:
    change_config(
        folder,
        r=8,
        lora_alpha=4,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2},
        alpha_pattern={"down_proj": 16},
        use_rslora=False,
    )
    config = read_config(folder)
    assert config.scaling_of("model.layers.0.self_attn.q_proj") == 0.5
    assert config.scaling_of("model.layers.1.self_attn.q_proj") == 2.0
    assert config.scaling_of("model.layers.1.mlp.down_proj") == 2.0
    change_config(folder, use_rslora=True, rank_pattern={}, alpha_pattern={})
    assert read_config(folder).scaling_of("model.layers.0.mlp.down_proj") == 4 / 8**0.5
    change_config(folder, layers_to_transform=[1], exclude_modules=["down_proj"])
    config = read_config(folder)
    assert config.targets("model.layers.1.self_attn.q_proj")
    assert not config.targets("model.layers.0.self_attn.q_proj")
    assert not config.targets("model.layers.1.mlp.down_proj")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "other kind": ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
    "DoRA": ({"use_dora": True}, "use_dora, which is not supported"),
    "biases": ({"bias": "lora_only"}, "bias 'lora_only' is not supported"),
    "bias of B": ({"lora_bias": True}, "lora_bias"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "trained tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["experts.down"]}, "target_parameters"),
    "copied layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "unheard of": ({"use_tomorrow": True}, "use_tomorrow"),
    "residual base": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight"),
    "no targets": ({"target_modules": None}, "target_modules"),
    "no rank": ({"r": 0}, "r must be a positive integer"),
    "odd alpha": ({"lora_alpha": "much"}, "could not convert"),
    "odd pattern": ({"rank_pattern": {"(": 4}}, "unterminated|missing"),
    "odd targets": ({"target_modules": [1]}, "list of strings"),
    "rank": ({"r": 6}, r"has the shape .*4.*, not .*6"),
    "large rank": ({"r": 17}, "17, over the maximum of 16: raise --max-lora-rank"),
    "more layers": (
        {"target_modules": [*TARGETS, "k_proj"]},
        "no weights for model.layers.0.self_attn.k_proj",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_are_refused(
    folder: Path, linears: dict[str, LinearShape], name: str
) -> None:
    fields, message = CONFIGS[name]
    change_config(folder, **fields)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        read(folder, linears)
    assert caught.value.param == "lora_path" and "\n" not in caught.value.message


def _drop(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != named(tensors, pattern)}


def _put(pattern: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {named(tensors, pattern): tensor}


def _rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


A, B = r"0.self_attn.q_proj.lora_A", r"0.self_attn.q_proj.lora_B"
TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no A": (_drop(A), "no lora_A for model.layers.0.self_attn.q_proj"),
    "no B": (_drop(B), "no lora_B for model.layers.0.self_attn.q_proj"),
    "NaN": (_put(A, torch.full((4, 32), float("nan"))), "lora_A.weight has numbers that are not"),
    "infinity": (_put(B, torch.full((32, 4), float("inf"))), "lora_B.weight has numbers that"),
    "other width": (_put(A, torch.zeros(4, 33)), r"has the shape \[4, 33\], not \[4, 32\]"),
    "other height": (_put(B, torch.zeros(31, 4)), r"has the shape \[31, 4\], not \[32, 4\]"),
    "integers": (_put(B, torch.zeros(32, 4, dtype=torch.int8)), "no float type"),
    "vector": (_put(B, torch.zeros(128)), r"has the shape \[128\]"),
    "unknown module": (_rename("0.self_attn.q_proj", "0.self_attn.x_proj"), "x_proj, which is no"),
    "too many layers": (_rename("layers.1.", "layers.7."), "model.layers.7.*, which is no"),
    "the head": (_rename("model.layers.0.self_attn.q_proj", "lm_head"), "lm_head, which is no"),
    "embeddings": (_rename("q_proj.lora_A.weight", "q_proj.lora_embedding_A"), "embeddings"),
    "magnitudes": (_rename("q_proj.lora_A.weight", "q_proj.lora_magnitude_vector"), "DoRA"),
    "a whole module": (lambda tensors: tensors | {"x.weight": torch.zeros(1)}, "x.weight is not"),
    "nothing": (lambda tensors: {}, "no weights"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_refused(folder: Path, linears: dict[str, LinearShape], name: str) -> None:
    change, message = TENSORS[name]
    change_tensors(folder, change)
    with pytest.raises(InvalidRequestError, match=message):
        read(folder, linears)


def test_files_that_are_refused(folder: Path, linears: dict[str, LinearShape]) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    content = weights.read_bytes()

    def refused() -> str:
        with pytest.raises(InvalidRequestError) as caught:
            read(folder, linears)
        assert "\n" not in caught.value.message
        return caught.value.message

    for cut in (0, 7, 100, len(content) - 1):
        weights.write_bytes(content[:cut])
        assert "cannot read" in refused()
    weights.unlink()
    assert "there is no file" in refused()
    torch.save({}, folder / "adapter_model.bin")
    assert "is a pickle" in refused()
    save_file({}, weights)
    for text in ("", "[]", "{", '{"peft_type": "LORA"', "[" * 100_000):
        config.write_text(text)
        assert str(config) in refused()
    config.write_text(" " * (2 << 20))
    assert "larger than" in refused()
    config.unlink()
    assert "cannot read" in refused()
    config.mkdir()
    assert "no regular file" in refused()
    config.rmdir()
    os.mkfifo(config)
    assert "no regular file" in refused()


def test_an_adapter_that_was_read_does_not_depend_on_its_file(
    folder: Path, linears: dict[str, LinearShape]
) -> None:
    """A new version may be written over the old one, which is in use until it is replaced."""
    adapter = read(folder, linears)
    before = [part.clone() for weight in adapter.weights.values() for part in weight]
    file = folder / "adapter_model.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    after = [part for weight in adapter.weights.values() for part in weight]
    assert all(map(torch.equal, before, after))
