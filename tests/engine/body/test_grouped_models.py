"""Test whole models with grouped layers: of one kind, of several kinds in a layer, among dense
ones; on the CPU as they are, on other devices made dense."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama import LlamaConfig

from quire.engine.body.grouped_linear import GroupedLinear, GroupedWeight
from quire.engine.body.merged_linear import MergedLinear
from quire.engine.devices.cpu.decoder import CpuDecoder
from quire.engine.devices.cpu.packed_linear import PackedLinear
from quire.engine.devices.cpu.packing import round_to_int4
from quire.engine.model import loader
from quire.kernels.cpu.integer.products import IntegerWeight

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..models import COMMON, build_model, generate
from ..test_oracle import Engine, Reference, RoundedLinear, prompts

SIZES = COMMON | {"hidden_size": 64, "intermediate_size": 128}


def in_halves(weight: torch.Tensor, group: int) -> GroupedWeight:
    """Round to 8 bits in groups, without minimums."""
    groups = weight.unflatten(1, (-1, group))
    scale = groups.abs().amax(dim=2) / 127
    quants = (groups / scale[..., None]).round().flatten(1).to(torch.int8)
    return GroupedWeight(quants, scale, None, 8, group)


def kind_of(name: str, layer: int, mix: str) -> str:
    """Return what a linear layer becomes."""
    if mix == "alike" or layer == 0:
        return "q4"
    kinds = {"v_proj": "q8", "down_proj": "q6", "up_proj": "q8", "o_proj": "dense"}
    if mix == "with dense":
        kinds |= {"k_proj": "dense", "gate_proj": "dense"}
    return kinds.get(name, "q4")


def group_layers(model: PreTrainedModel, mix: str) -> PreTrainedModel:
    """Make linear layers grouped ones; return a copy whose dense weights are the same."""
    dense = copy.deepcopy(model)
    for layer, block in enumerate(model.model.layers):
        for path, linear in list(block.named_modules()):
            if type(linear) is not nn.Linear:
                continue
            kind = kind_of(path.rpartition(".")[2], layer, mix)
            weight = linear.weight.detach()
            if kind == "dense":
                continue
            made = {
                "q4": round_to_int4,
                "q8": lambda weight: in_halves(weight, 32),
                "q6": lambda weight: in_halves(weight, 16),
            }[kind](weight)
            block.set_submodule(path, GroupedLinear(made, None, torch.float32))
            dense.model.layers[layer].get_submodule(path).weight.data.copy_(made.dense())
    return dense


def start(
    folder: Path,
    config: Any,
    mix: str,
    monkeypatch: pytest.MonkeyPatch,
    backend: CudaOnCpuBackend | None = None,
) -> tuple[Engine, PreTrainedModel]:
    """Start an engine on a model with grouped layers. Returns a dense one of the same weights."""
    model = build_model(config)
    model.save_pretrained(folder)
    dense = group_layers(model, mix)

    def loaded(*_: Any, **__: Any) -> tuple[Any, bool]:
        model.set_attn_implementation(loader.IMPLEMENTATION)
        return model, True

    monkeypatch.setattr(loader, "_load_weights", loaded)
    return Engine(folder, backend), dense


def round_inputs(model: PreTrainedModel, mix: str) -> None:
    """Let layers that are grouped on the CPU round their inputs. Dense siblings of grouped ones
    make those dense, and so exact."""
    for layer, block in enumerate(model.model.layers):
        for path, linear in list(block.named_modules()):
            name = path.rpartition(".")[2]
            if type(linear) is not nn.Linear or kind_of(name, layer, mix) == "dense":
                continue
            if mix == "with dense" and layer and name != "down_proj":
                continue
            group = 16 if kind_of(name, layer, mix) == "q6" else 32
            made = RoundedLinear(linear, "int8", group)
            made.weight = linear.weight.detach()
            block.set_submodule(path, made)


@pytest.mark.parametrize("mix", ["alike", "mixed", "with dense"])
def test_a_compiled_body_keeps_grouped_weights(
    mix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, dense = start(tmp_path, LlamaConfig(**SIZES), mix, monkeypatch)
    body: Any = engine.worker._model._body
    assert isinstance(body, CpuDecoder)
    kinds = [
        [type(weight) for weight in getattr(body._layers, name)]
        for name in ("qkv", "output", "gate_up", "down")
    ]
    assert all(kind[0] is IntegerWeight for kind in kinds)
    second = {"alike": [True] * 4, "mixed": [True, False, True, True]}
    expected = second.get(mix, [False, False, False, True])
    assert [kind[1] is IntegerWeight for kind in kinds] == expected
    round_inputs(dense, mix)
    reference = Reference(dense)
    wanted = prompts(8)
    requests = [engine.add(prompt, 10) for prompt in wanted]
    engine.run()
    for request, prompt in zip(requests, wanted, strict=True):
        assert engine.tokens(request) == reference.complete(prompt, 10)


def test_a_body_of_transformers_keeps_grouped_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(**SIZES, hidden_act="gelu")
    engine, dense = start(tmp_path, config, "mixed", monkeypatch)
    body: Any = engine.worker._model._body
    packed = [module for module in body._model.modules() if isinstance(module, PackedLinear)]
    assert [type(module.packed) for module in packed].count(IntegerWeight) == 7
    merged = [module for module in body._model.modules() if isinstance(module, MergedLinear)]
    assert all(isinstance(module.linear, PackedLinear) for module in merged)
    for prompt in prompts(3):
        logits = dense(torch.tensor([prompt])).logits[0, -1]
        best = int(logits.argmax())
        assert engine.complete(prompt, 1) == [best] or logits.topk(2).values.diff().abs() < 0.2


def test_cuda_multiplies_by_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CudaOnCpuBackend()
    engine, dense = start(tmp_path, LlamaConfig(**SIZES), "mixed", monkeypatch, backend)
    model: Any = engine.worker._model
    layer = model._body.decoder.layers[1]
    grouped = [part for part in (*layer, *layer.mlp) if isinstance(part, GroupedLinear)]
    assert len(grouped) > 2 and all(part.multiply is not None for part in grouped)
    for prompt in prompts(4):
        assert engine.complete(prompt, 8) == generate(dense, prompt, 8)
