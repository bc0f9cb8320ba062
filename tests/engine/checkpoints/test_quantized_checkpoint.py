"""Test that quantised safetensors compute what transformers makes of their dequantised weights."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from quire.engine.body.body import HfBody
from quire.engine.body.grouped_linear import GroupedLinear
from quire.engine.checkpoints.checkpoint import open_checkpoint
from quire.engine.checkpoints.tensor_files import TensorFiles
from quire.engine.devices.cpu.backend import CpuBackend
from quire.engine.errors import ModelLoadError
from quire.engine.model.assemble import assemble

from ..models import generate
from ..worker_driver import Driver, load, make_config, make_sequence
from .quantized_files import FORMATS, load_tensors, save_tensors, write_model

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


def quantised(tmp_path: Path, form: str, family: str = "llama") -> tuple[Path, dict[str, Any]]:
    """Return a folder in a format, and its tensors."""
    write_model(tmp_path, family, FORMATS[form])
    folder = tmp_path / "quantised"
    return folder, load_tensors(folder)


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("form", "last", "value", "reason"),
    [
        ("awq", "scales", torch.ones(3, 64).half(), "scales has 3 groups, which do not divide 32"),
        ("awq", "scales", torch.ones(1, 63).half(), r"scales has the shape \(1, 63\)"),
        ("awq", "scales", torch.ones(64).half(), "not two dimensions"),
        ("awq", "scales", torch.ones(1, 64, dtype=torch.int32), "scales is of type I32"),
        ("awq", "scales", torch.full((1, 64), torch.nan).half(), "scales has numbers that are not"),
        ("awq", "qzeros", None, "qzeros is missing"),
        ("awq", "qweight", torch.ones(32, 7, dtype=torch.int32), "qweight has the shape"),
        ("gptq-4", "scales", torch.full((1, 64), torch.inf).half(), "numbers that are not finite"),
        ("gptq-4", "scales", None, "scales is missing"),
        ("gptq-4", "qweight", torch.ones(3, 64, dtype=torch.int32), "no other number of bits"),
        ("gptq-4", "qzeros", torch.ones(1, 64, dtype=torch.int32), "qzeros has the shape"),
        ("gptq-4", "g_idx", torch.full((32,), 7, dtype=torch.int32), "index of groups"),
        ("gptq-4", "g_idx", torch.full((32,), -1, dtype=torch.int32), "index of groups"),
        ("packed-4", "weight_packed", torch.ones(64, 4).half(), "weight_packed is of type F16"),
        ("packed-4", "weight_scale", torch.ones(64, 5).half(), "do not divide 32 columns"),
        ("packed-4", "weight_scale", torch.full((64, 2), -torch.inf).half(), "not finite"),
        ("packed-4-asymmetric", "weight_zero_point", torch.ones(8, 2, dtype=torch.int32), "shape"),
        ("integers", "weight_scale", torch.ones(63, 1), "does not fit"),
        ("integers", "weight_scale", None, "weight_scale is missing"),
        ("integers", "weight", torch.ones(64, 32, dtype=torch.int16), "weight is of type I16"),
        ("float8-row", "weight_scale", None, "weight_scale is missing"),
        ("float8-row", "weight_zero_point", torch.ones(64, 1), "weight_zero_point is not zero"),
        ("float8-blocks", "weight_scale_inv", torch.ones(4, 1), "does not fit|shape"),
        ("float8-blocks", "weight_scale_inv", torch.full((4, 2), torch.nan), "not finite"),
        (
            "float8-blocks",
            "weight",
            torch.full((64, 32), torch.nan).to(torch.float8_e4m3fn),
            "weight has numbers that are not finite",
        ),
        ("float8-blocks", "weight", torch.ones(64, 31), r"weight has the shape \(64, 31\)"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, form: str, last: str, value: torch.Tensor | None, reason: str
) -> None:
    folder, tensors = quantised(tmp_path, form)
    tensors.pop(f"{LAYER}.{last}", None)
    if value is not None:
        tensors[f"{LAYER}.{last}"] = value
    save_tensors(folder, tensors)
    with pytest.raises(ModelLoadError, match=reason) as caught:
        assembled(folder)
    assert LAYER in caught.value.message and "\n" not in caught.value.message


def test_shapes_are_checked_before_any_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tensors = quantised(tmp_path, "awq")
    tensors[f"{LAYER}.scales"] = torch.ones(3, 64).half()
    save_tensors(folder, tensors)
    read: list[str] = []
    monkeypatch.setattr(TensorFiles, "read", lambda self, name: read.append(name))
    with pytest.raises(ModelLoadError, match="3 groups"):
        assembled(folder)
    assert not read


@pytest.mark.parametrize("change", ["cut", "garbled", "missing", "no index", "odd index"])
def test_broken_files_are_refused_in_one_line(tmp_path: Path, change: str) -> None:
    folder, _ = quantised(tmp_path, "packed-4")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    index = folder / "model.safetensors.index.json"
    if change == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif change == "garbled":
        file.write_bytes(b"\xff" * 64)
    elif change == "missing":
        file.unlink()
    elif change == "no index":
        index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    else:
        index.write_text("[]")
    with pytest.raises(ModelLoadError, match="cannot (read|find) the weights") as caught:
        load(folder)
    assert "\n" not in caught.value.message


def test_tensors_that_are_missing_or_left_over_are_refused(tmp_path: Path) -> None:
    folder, tensors = quantised(tmp_path, "packed-4")
    save_tensors(folder, tensors | {"model.layers.0.mlp.extra.weight": torch.ones(2)})
    with pytest.raises(ModelLoadError, match=r"1 tensors have no place .*mlp\.extra\.weight"):
        load(folder)
    del tensors["model.norm.weight"]
    save_tensors(folder, tensors)
    with pytest.raises(ModelLoadError, match=r"1 weights are missing, the first model\.norm"):
        load(folder)
    tensors["model.norm.weight"] = torch.full((32,), torch.nan)
    save_tensors(folder, tensors)
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight has numbers that are not"):
        load(folder)


def test_weights_in_several_files_and_of_more_layers_are_read(tmp_path: Path) -> None:
    """A layer after the last is a head that predicts more tokens, which is not used."""
    expected = write_model(tmp_path, "llama", FORMATS["packed-4"])
    folder = tmp_path / "quantised"
    tensors = load_tensors(folder)
    (folder / "model.safetensors").unlink()
    tensors["model.layers.2.enorm.weight"] = torch.ones(32)
    weight_map = {}
    for number, name in enumerate(sorted(tensors)):
        weight_map[name] = f"part-{number % 3}.safetensors"
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    torch.testing.assert_close(logits(assembled(folder)), logits(expected), rtol=0, atol=1e-4)


def test_layers_that_were_not_converted_stay_dense(tmp_path: Path) -> None:
    some = re.compile(r"(down|[qk])_proj\.weight$")
    expected = write_model(tmp_path, "llama", FORMATS["awq"], some)
    model = assembled(tmp_path / "quantised")
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-4)
    assert len(grouped_layers(model)) == 2 * 3


def test_a_quantised_head_and_a_tied_one(tmp_path: Path) -> None:
    names = re.compile(r"(_proj|lm_head)\.weight$")
    expected = write_model(tmp_path, "llama", FORMATS["gptq-4"], names)
    model = assembled(tmp_path / "quantised")
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-4)
    assert isinstance(model.lm_head, GroupedLinear)


@pytest.mark.parametrize("form", ["float8-row", "float8-tensor", "float8-blocks"])
def test_float8_stays_so_for_a_device_that_multiplies_it(tmp_path: Path, form: str) -> None:
    expected = write_model(tmp_path, "llama", FORMATS[form])
    model = assembled(tmp_path / "quantised", keep_float8=True)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-4)
    kept = grouped_layers(model)
    assert len(kept) == 2 * 7 and {layer.grouped.kind for layer in kept} == {"float8"}
    assert all(layer.grouped.quants.dtype == torch.float8_e4m3fn for layer in kept)


def test_a_layer_with_another_order_of_inputs_is_made_dense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = quantised(tmp_path, "gptq-act-order")
    with caplog.at_level(logging.INFO):
        assembled(folder)
    assert "GPTQ of 4 bits with inputs in another order made dense float32" in caplog.text


def test_what_is_said_of_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = quantised(tmp_path / "a", "float8-tensor")
    with caplog.at_level(logging.INFO):
        facts = load(folder).weights
    assert facts.source_format == "safetensors fp8" and facts.computed_format == "float32"
    assert "of float8 made dense float32: 3.99 times their size" in caplog.text
    assert "the checkpoint rounds activations too" in caplog.text
    folder, _ = quantised(tmp_path / "b", "packed-4")
    facts = load(folder).weights
    assert facts.source_format == "safetensors compressed-tensors pack-quantized"
    assert "4-bit groups" in facts.computed_format
    elements = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    dense = 2 * 128 * 32 + 5 * 32 + 2 * (2 * 32 + 2 * 16)
    assert facts.num_parameters == elements + dense
    # 4 bits, and a scale of 16 for each group of 16.
    assert facts.num_bytes == elements * (4 + 16 / 16) / 8 + 4 * dense


def test_a_body_that_was_saved_alone_and_biases_of_zeros_are_read(tmp_path: Path) -> None:
    expected = write_model(tmp_path, "qwen3", FORMATS["gptq-4"])
    folder = tmp_path / "quantised"
    tensors = {name.removeprefix("model."): one for name, one in load_tensors(folder).items()}
    tensors["layers.0.mlp.up_proj.bias"] = torch.zeros(64)
    save_tensors(folder, tensors)
    torch.testing.assert_close(logits(assembled(folder)), logits(expected), rtol=0, atol=1e-4)
    tensors["layers.0.mlp.up_proj.bias"][3] = 1
    save_tensors(folder, tensors)
    with pytest.raises(ModelLoadError, match=r"no place .*up_proj\.bias"):
        assembled(folder)


def test_scales_may_be_powers_of_two(tmp_path: Path) -> None:
    folder, tensors = quantised(tmp_path, "float8-blocks")
    for name in [name for name in tensors if name.endswith("scale_inv")]:
        tensors[name] = torch.exp2(tensors[name].log2().round())
    save_tensors(folder, tensors)
    expected = logits(assembled(folder))
    for name in [name for name in tensors if name.endswith("scale_inv")]:
        tensors[name] = tensors[name].to(torch.float8_e8m0fnu)
    save_tensors(folder, tensors)
    assert torch.equal(logits(assembled(folder)), expected)
