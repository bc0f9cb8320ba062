"""Tiny models saved in the formats of quantised safetensors, after the formats' own definitions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import LlamaConfig

from ..models import COMMON, FAMILIES, build_model

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**COMMON, attention_bias=True),
    "qwen3": FAMILIES["qwen3"],
    "qwen3_moe": FAMILIES["qwen3_moe"],
    "mixtral": FAMILIES["mixtral"],
}
QUANTISED = re.compile(r"(_proj|\.w[123])\.weight$")
"""Names of the weights that are quantised by default; a head and routers stay dense."""
Tensors = dict[str, torch.Tensor]


class Rounded(NamedTuple):
    """Unsigned integers `[N, K]`, and scale and zero of each group `[N, G]`."""

    integers: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int

    def dense(self) -> torch.Tensor:
        rows, columns = self.integers.shape
        groups = self.integers.view(rows, self.scale.shape[1], -1)
        return ((groups - self.zero[..., None]) * self.scale[..., None]).view(rows, columns)


class Format(NamedTuple):
    """A format: what config.json says of it, and what writes one layer's tensors and its dense
    weight."""

    quantization: dict[str, Any]
    write: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
    is_kept: bool = True


def round_weight(weight: torch.Tensor, bits: int, group: int, *, symmetric: bool) -> Rounded:
    """Round to the nearest of 2**bits steps in each group of `group` columns; -1 is a whole row."""
    groups = weight.float().view(len(weight), -1, weight.shape[1] if group < 0 else group)
    top = 2**bits - 1
    if symmetric:
        scale = groups.abs().amax(dim=2) / (top // 2)
        scale = scale.half().float()
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
        scale = ((high - low) / top).half().float()
        zero = (-low / scale).round().clamp(0, top)
    integers = (groups / scale[..., None]).round() + zero[..., None]
    return Rounded(integers.clamp(0, top).view(weight.shape), scale, zero, bits)


def pack_words(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """`[rows, n]` integers → `[rows, n * bits/32]` int32, the first in the lowest bits."""
    per_word = 32 // bits
    words = torch.zeros(len(fields), fields.shape[1] // per_word, dtype=torch.int64)
    for place in range(per_word):
        words |= fields[:, place::per_word].long() << (bits * place)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _awq(group: int) -> Format:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def pack(fields: torch.Tensor) -> torch.Tensor:
        octets = fields.view(len(fields), -1, 8)[..., list(order)]
        return pack_words(octets.flatten(1), 4)

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        found = round_weight(weight, 4, group, symmetric=False)
        return {
            "qweight": pack(found.integers.T.contiguous()),
            "qzeros": pack(found.zero.T.contiguous()),
            "scales": found.scale.T.half().contiguous(),
        }, found.dense()

    about = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return Format(about | {"zero_point": True}, write)


def _gptq(
    bits: int, group: int, *, symmetric: bool = True, version: int = 1, ordered: bool = True
) -> Format:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        columns = weight.shape[1]
        size = columns if group < 0 else group
        order = torch.arange(columns)
        if not ordered:  # the groups of columns that were rounded in another order
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
        found = round_weight(weight[:, order], bits, size, symmetric=symmetric)
        if version == 1:  # which cannot store a zero of 0, as minus one
            found = found._replace(zero=found.zero.clamp(min=1))
        back = order.argsort()
        integers = found.integers[:, back]
        stored = found.zero - (1 if version == 1 else 0)
        return {
            "qweight": pack_words(integers, bits).T.contiguous(),
            "qzeros": pack_words(stored.T.contiguous(), bits),
            "scales": found.scale.T.half().contiguous(),
            "g_idx": (back // size).to(torch.int32),
        }, found.dense()[:, back]

    about = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": not ordered}
    about["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    return Format(about, write, ordered)


def _compressed(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def _packed(bits: int, group: int, *, symmetric: bool = True) -> Format:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        found = round_weight(weight, bits, group, symmetric=symmetric)
        tensors = {
            "weight_packed": pack_words(found.integers, bits),
            "weight_scale": found.scale.half(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            zeros = pack_words(found.zero.T.contiguous(), bits)
            tensors["weight_zero_point"] = zeros.T.contiguous()
        return tensors, found.dense()

    about = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    about |= {"strategy": "channel"} if group < 0 else {"strategy": "group", "group_size": group}
    return Format(_compressed("pack-quantized", about), write)


def _integers(group: int = -1, *, symmetric: bool = True) -> Format:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        found = round_weight(weight, 8, group, symmetric=symmetric)
        tensors = {
            "weight": (found.integers - 128).to(torch.int8),
            "weight_scale": found.scale.bfloat16().float(),
        }
        found = found._replace(scale=tensors["weight_scale"])
        if not symmetric:
            tensors["weight_zero_point"] = (found.zero - 128).to(torch.int8)
        return tensors, found.dense()

    about = {"num_bits": 8, "type": "int", "symmetric": symmetric}
    about |= {"strategy": "channel"} if group < 0 else {"strategy": "group", "group_size": group}
    return Format(_compressed("int-quantized", about), write)


def _float8(scale_of: Callable[[torch.Tensor], torch.Tensor], name: str) -> Any:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale = scale_of(weight)
        stored = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors = {"weight": stored, name: scale, "input_scale": torch.tensor(0.5)}
        return tensors, stored.float() * scale

    return write


def _float8_blocks(rows: int, columns: int) -> Format:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale = torch.empty(-(-len(weight) // rows), -(-weight.shape[1] // columns))
        wide = torch.empty_like(weight)
        for i, j in torch.cartesian_prod(*(torch.arange(size) for size in scale.shape)).tolist():
            where = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale[i, j] = wide[where] = weight[where].abs().max() / 448
        stored = (weight / wide).to(torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale_inv": scale}, stored.float() * wide

    about = {"quant_method": "fp8", "weight_block_size": [rows, columns]}
    return Format(about | {"activation_scheme": "dynamic"}, write, False)


def _by_tensor(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().max() / 448


def _by_row(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().amax(dim=1, keepdim=True) / 448


_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
FORMATS = {
    "awq": _awq(32),
    "awq-16": _awq(16),
    "gptq-4": _gptq(4, 32),
    "gptq-4-asymmetric": _gptq(4, 16, symmetric=False),
    "gptq-v2": _gptq(4, 32, symmetric=False, version=2),
    "gptq-8": _gptq(8, 32),
    "gptq-8-asymmetric": _gptq(8, -1, symmetric=False, version=2),
    "gptq-act-order": _gptq(4, 16, symmetric=False, ordered=False),
    "packed-4": _packed(4, 16),
    "packed-4-asymmetric": _packed(4, 32, symmetric=False),
    "packed-4-channel": _packed(4, -1),
    "packed-8": _packed(8, 32),
    "packed-8-asymmetric": _packed(8, -1, symmetric=False),
    "integers": _integers(),
    "integers-asymmetric": _integers(16, symmetric=False),
    "float8-row": Format(
        _compressed("float-quantized", _FLOAT8 | {"strategy": "channel"}),
        _float8(_by_row, "weight_scale"),
        False,
    ),
    "float8-tensor": Format(
        {"quant_method": "fp8", "activation_scheme": "static"},
        _float8(_by_tensor, "weight_scale_inv"),
        False,
    ),
    "fbgemm": Format({"quant_method": "fbgemm_fp8"}, _float8(_by_row, "weight_scale"), False),
    "float8-blocks": _float8_blocks(16, 16),
    "float8-uneven-blocks": _float8_blocks(24, 24),
}


def write_model(
    folder: Path, family: str, form: Format, names: re.Pattern[str] = QUANTISED
) -> PreTrainedModel:
    """Save a tiny model in a format; weights whose names match are quantised. Returns what
    transformers makes of the dequantised weights."""
    dense, quantised = folder / "dense", folder / "quantised"
    model = build_model(MODELS[family]())
    model.save_pretrained(dense)
    model.save_pretrained(quantised)
    tensors = load_file(dense / "model.safetensors")
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if names.search(name):
            parts, tensors[name] = form.write(tensor)
            base = name.removesuffix(".weight")
            stored |= {f"{base}.{last}": part for last, part in parts.items()}
        else:
            stored[name] = tensor
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    save_tensors(quantised, stored)
    set_quantization(quantised, form.quantization)
    return AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def set_quantization(folder: Path, quantization: dict[str, Any]) -> None:
    """Write a quantization_config into the folder's config.json."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | {"quantization_config": quantization}
    file.write_text(json.dumps(values))


def load_tensors(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def save_tensors(folder: Path, tensors: Tensors) -> None:
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
