"""Test which methods of quantisation are read, made dense by transformers, or refused, and that
their packages' own code agrees with the readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire.engine.checkpoints import quantized_config
from quire.engine.checkpoints.checkpoint import open_checkpoint
from quire.engine.checkpoints.quantized_checkpoint import QuantizedCheckpoint
from quire.engine.errors import ModelLoadError, UnsupportedModelError
from quire.engine.model.outline import outline
from quire.engine.model.rehearse import rehearse_load

from ..models import generate, save_model
from ..worker_driver import Driver, load, make_config, make_sequence
from .quantized_files import FORMATS, load_tensors, pack_words, save_tensors, set_quantization
from .test_quantized_checkpoint import PROMPT, assembled, logits, quantised


def test_packed_words_are_those_of_compressed_tensors() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    integers = torch.randint(0, 256, (6, 64), generator=torch.Generator().manual_seed(0))
    for bits in (4, 8):
        fields = integers % 2**bits
        signed = (fields - 2 ** (bits - 1)).to(torch.int8)
        assert torch.equal(pack_words(fields, bits), pack_to_int32(signed, bits))


def test_awq_is_what_compressed_tensors_converts_it_to(tmp_path: Path) -> None:
    """Its converter's weights are those that are read from the AWQ tensors."""
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    folder, tensors = quantised(tmp_path, "awq")
    expected = logits(assembled(folder))
    converted = AutoAWQConverter(group_size=32).process(tensors)
    save_tensors(folder, converted)
    set_quantization(folder, FORMATS["packed-4-asymmetric"].quantization)
    torch.testing.assert_close(logits(assembled(folder)), expected, rtol=0, atol=1e-6)


DEQUANTISED = [
    "packed-4",
    "packed-4-asymmetric",
    "packed-8",
    "integers",
    "integers-asymmetric",
    "float8-row",
    "float8-blocks",
]


@pytest.mark.parametrize("form", DEQUANTISED)
def test_what_transformers_makes_dense_is_the_same(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so for models whose tensors have other names than their parameters. Its products
    with scales of 16 bits have 16 bits, so these have 32."""
    folder, tensors = quantised(tmp_path, form)
    for name in tensors:
        if name.endswith("_scale"):
            tensors[name] = tensors[name].float()
    save_tensors(folder, tensors)
    expected = logits(assembled(folder))
    monkeypatch.setattr(QuantizedCheckpoint, "_has_other_parts", lambda self: True)
    checkpoint = open_checkpoint(make_config(folder))
    assert checkpoint is not None and checkpoint.load_arguments is not None
    model = AutoModelForCausalLM.from_pretrained(
        **checkpoint.load_arguments,
        config=checkpoint.hf_config(),
        dtype=torch.float32,
        attn_implementation="eager",
    )
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    facts = load(folder, dtype="float32").weights
    assert facts.computed_format == "float32"


def write_mxfp4(folder: Path) -> Any:
    """Save a tiny gpt-oss with experts in mxfp4: blocks of 32 numbers of e2m1, a power of two
    each. Returns what transformers makes of the dequantised weights."""
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat((values, -values))
    model = save_model("gpt_oss", folder)
    tensors = load_tensors(folder)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, columns, rows = parameter.shape  # [E, in, out]; blocks are along the inputs
        codes = torch.randint(0, 16, (experts, rows, columns), generator=generator)
        powers = torch.randint(-4, -1, (experts, rows, columns // 32), generator=generator)
        dense = values[codes] * torch.exp2(powers).repeat_interleave(32, dim=2)
        parameter.data = dense.transpose(1, 2).contiguous()
        del tensors[name]
        octets = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_blocks"] = octets.view(experts, rows, -1, 16)
        tensors[f"{name}_scales"] = (powers + 127).to(torch.uint8)
    save_tensors(folder, tensors)
    set_quantization(folder, {"quant_method": "mxfp4"})
    return model


def test_mxfp4_is_made_dense_by_transformers(tmp_path: Path) -> None:
    expected = write_mxfp4(tmp_path)
    driver = Driver.start(make_config(tmp_path, dtype="float32"))
    facts = driver.worker._model.weights
    assert (facts.source_format, facts.computed_format) == ("safetensors mxfp4", "float32")
    [tokens] = driver.run([make_sequence(PROMPT, 8)])
    assert tokens == generate(expected, PROMPT, 8)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "package bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt': its formats NVFP4"),
        ({"quant_method": "modelopt_fp4"}, "modelopt"),
        ({"quant_method": "nvfp4"}, "nvfp4"),
        ({"quant_method": "hqq"}, "'hqq': its format is not known"),
        ({"quant_method": "awq", "version": "gemv"}, "layout 'gemv'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout 'marlin'"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
            "sparse-bitmask",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "transform_config": {"config_groups": {"u": {}}},
            },
            "transform_config",
        ),
        ({"bits": 4}, "'None'"),
    ],
)
def test_other_methods_are_refused_with_a_reason(
    tmp_path: Path, quantization: dict[str, Any], reason: str
) -> None:
    save_model("llama", tmp_path)
    set_quantization(tmp_path, quantization)
    with pytest.raises(UnsupportedModelError, match=reason):
        load(tmp_path)
    for refuses in (open_checkpoint, rehearse_load):
        with pytest.raises(UnsupportedModelError, match=reason):
            refuses(make_config(tmp_path))


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ([1], "no object"),
        ({"quant_method": "awq", "bits": "four"}, "bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 1.5}, "group_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size"),
        ({"quant_method": "compressed-tensors", "config_groups": ["a"]}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": 1}}, "config_groups"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": [4]}}},
            "config_groups",
        ),
        ({"quant_method": "compressed-tensors", "sparsity_config": "2:4"}, "sparsity_config"),
    ],
)
def test_values_of_other_types_are_refused(tmp_path: Path, quantization: Any, name: str) -> None:
    save_model("llama", tmp_path)
    set_quantization(tmp_path, quantization)
    for refuses in (open_checkpoint, rehearse_load):
        with pytest.raises(ModelLoadError, match=f"wrong value: .*{name}"):
            refuses(make_config(tmp_path))
    assert outline(make_config(tmp_path), keeps_groups=True).refused


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("llama", tmp_path)
    monkeypatch.setattr(quantized_config, "find_spec", lambda name: None)
    for method in ("awq", "mxfp8"):
        set_quantization(tmp_path, {"quant_method": method})
        with pytest.raises(UnsupportedModelError, match=r"pip install 'quire-server\[quantized\]'"):
            open_checkpoint(make_config(tmp_path))
