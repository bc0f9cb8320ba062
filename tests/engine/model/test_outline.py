"""Test that a model's outline says what the loader finds, and that nothing is loaded for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.falcon import FalconConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mamba import MambaConfig

from quire.engine.errors import StartupError, UnsupportedModelError
from quire.engine.model.outline import ModelOutline, outline
from quire.engine.model.rehearse import rehearse_load

from .. import latent_models
from ..checkpoints.gguf_files import write_model
from ..checkpoints.quantized_files import FORMATS
from ..checkpoints.quantized_files import write_model as write_quantised
from ..models import COMMON, FAMILIES, save_model
from ..worker_driver import load, make_config
from .test_loader import read_spec
from .test_text_part import save


def check_against_loader(path: Path, **overrides: Any) -> ModelOutline:
    config = make_config(path, dtype="float32", **overrides)
    found = outline(config, keeps_groups=True)
    assert found.refused is None
    model = load(path, dtype="float32", **overrides)
    assert found.architecture == model.spec.architecture
    assert found.source_format == model.weights.source_format
    assert found.num_parameters == model.weights.num_parameters
    assert found.weight_bytes == model.weights.num_bytes
    assert found.kv_bytes_per_token == model.spec.kv_bytes_per_token(4)
    assert found.max_model_len == 128
    rehearse_load(config)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_a_folder(tmp_path: Path, family: str) -> None:
    save_model(family, tmp_path)
    found = check_against_loader(tmp_path)
    assert found.file_bytes == found.weight_bytes


def test_latents_are_counted_once(tmp_path: Path) -> None:
    latent_models.build("minicpm3").save_pretrained(tmp_path)
    found = check_against_loader(tmp_path)
    assert found.kv_bytes_per_token == 2 * (32 + 16) * 4  # layers, numbers, float32


def test_a_folder_in_bfloat16_of_several_files(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path).to(torch.bfloat16)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    found = check_against_loader(tmp_path)
    assert found.file_bytes is not None and found.weight_bytes == 2 * found.file_bytes
    native = outline(make_config(tmp_path, dtype="auto"), keeps_groups=True)
    assert (native.dtype, native.weight_bytes) == ("bfloat16", found.file_bytes)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama-tied", "F16"), ("llama-tied", "Q6_K"), ("qwen3moe", "Q4_0")]
)
def test_a_gguf_file(tmp_path: Path, family: str, kind: str) -> None:
    file = tmp_path / "tiny.gguf"
    write_model(file, family, kind)
    found = check_against_loader(file)
    dense = outline(make_config(file, dtype="float32"), keeps_groups=False)
    assert dense.num_parameters is not None
    assert dense.weight_bytes == 4 * dense.num_parameters
    assert dense.file_bytes == found.file_bytes


def test_a_gguf_file_of_a_family_that_transformers_reads(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_model(file, "phi3", "Q8_0")
    found = outline(make_config(file, dtype="float32"), keeps_groups=True)
    model = load(file, dtype="float32")
    assert found.weight_bytes == model.weights.num_bytes
    assert found.kv_bytes_per_token == model.spec.kv_bytes_per_token(4)


def test_encoders_do_not_count(tmp_path: Path) -> None:
    save("mistral3", tmp_path)
    check_against_loader(tmp_path)


def test_weights_that_are_not_here_are_not_known(tmp_path: Path) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path)
    found = outline(make_config(tmp_path), keeps_groups=True)
    assert found.refused is None and found.kv_bytes_per_token
    assert found.num_parameters is found.weight_bytes is found.capacity(10**9) is None


def test_weights_on_the_hub_are_known_by_their_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from quire.engine.model import outline as module

    model = save_model("llama", tmp_path)
    tensors = {
        name: SimpleNamespace(dtype="BF16", shape=list(parameter.shape))
        for name, parameter in model.named_parameters()
    }
    remote = SimpleNamespace(files_metadata={"a": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda repository: remote)
    monkeypatch.setattr(module, "read_hf_config", lambda config: model.config)
    monkeypatch.setattr(module, "spec_from_hf_config", lambda *_: read_spec(tmp_path))
    found = outline(make_config(Path("owner/name"), dtype="bfloat16"), keeps_groups=True)
    assert found.source_format == "safetensors bfloat16"
    assert found.file_bytes == found.weight_bytes == 2 * model.num_parameters()


def test_capacity_is_what_memory_holds_beside_the_weights() -> None:
    found = ModelOutline(model="m", dtype="float32", weight_bytes=100, kv_bytes_per_token=10)
    assert found.capacity(199) == 9
    assert (found.capacity(0) or 0) < 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2), "linear_attention"),
        (LlamaConfig(**COMMON, quantization_config={"quant_method": "hqq"}), "hqq"),
    ],
)
def test_what_the_configuration_forbids_is_refused(
    tmp_path: Path, config: Any, reason: str
) -> None:
    config.save_pretrained(tmp_path)
    assert reason in (outline(make_config(tmp_path), keeps_groups=True).refused or "")
    with pytest.raises(StartupError, match=reason):
        rehearse_load(make_config(tmp_path))


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    found = outline(make_config(tmp_path), keeps_groups=True)
    assert "cannot read the weights" in (found.refused or "")
    assert "\n" not in str(asdict(found))


def test_building_a_model_shows_what_its_class_forbids(tmp_path: Path) -> None:
    config = FalconConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
        rehearse_load(make_config(tmp_path, max_model_len=None))


@pytest.mark.parametrize(
    ("form", "described"),
    [
        ("awq", "safetensors awq 4 bits"),
        ("packed-8", "safetensors compressed-tensors pack-quantized"),
        ("float8-blocks", "safetensors fp8 blocks"),
    ],
)
def test_quantised_weights_are_counted_as_they_are_computed(
    tmp_path: Path, form: str, described: str
) -> None:
    write_quantised(tmp_path, "llama", FORMATS[form])
    folder = tmp_path / "quantised"
    found = outline(make_config(folder, dtype="float32"), keeps_groups=True)
    facts = load(folder, dtype="float32").weights
    assert found.source_format == facts.source_format == described
    assert found.num_parameters == facts.num_parameters
    assert found.weight_bytes == pytest.approx(facts.num_bytes, rel=0.1)
    dense = outline(make_config(folder, dtype="float32"), keeps_groups=False)
    assert dense.weight_bytes == 4 * (found.num_parameters or 0)
