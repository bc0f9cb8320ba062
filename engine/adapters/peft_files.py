"""Reads an adapter from a folder that PEFT saved: adapter_config.json, adapter_model.safetensors.

Names and shapes are checked before any weight is read. Whatever does not fit the model that is
served is refused with the name of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..errors import one_line
from .adapter import Adapter, LinearShape, LoraWeight
from .peft_config import PeftConfig, read_config, refuse

_PREFIX = "base_model.model."
"""The beginning of all names of tensors."""
_ENDS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_FLOATS = ("F64", "F32", "F16", "BF16")


class _Pair(NamedTuple):
    """The names of the tensors A and B of a layer, as far as they are there, by "A" and "B"."""

    module: str
    tensors: dict[str, str]


def read_adapter(
    folder: Path, linears: Mapping[str, LinearShape], prefix: str, max_rank: int | None
) -> Adapter:
    """Read the adapter in a folder for a model with these linear layers.

    Layers are named as in the whole model, or without the name `prefix` of its body. Raises
    InvalidRequestError if a file cannot be read, is not served, or does not fit the model, or if a
    rank is over `max_rank`. It changes nothing and may run in any thread.
    """
    config = read_config(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = ": adapter_model.bin is a pickle, which may run code when it is read" * pickled
        raise refuse(f"there is no file {file}{why}")
    try:
        with safe_open(file, framework="pt") as tensors:
            pairs = _find_pairs(tensors, linears, prefix)
            _check_complete(pairs, linears, config)
            for name, pair in pairs.items():
                _check_pair(tensors, pair, linears[name], config, max_rank)
            weights = {name: _read(tensors, pair, config) for name, pair in pairs.items()}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise refuse(f"cannot read {file}: {one_line(error)}") from error
    return Adapter(weights)


def _find_pairs(tensors: Any, linears: Mapping[str, LinearShape], prefix: str) -> dict[str, _Pair]:
    """Return the tensors by the layers of the model that they are for."""
    pairs: dict[str, _Pair] = {}
    for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
        end = next((end for end in _ENDS if name.endswith(end)), None)
        if end is None or not name.startswith(_PREFIX):
            raise refuse(f"the tensor {name} is not supported: {_kind_of(name)}")
        module = name[len(_PREFIX) : -len(end)]
        layer = module if module in linears else f"{prefix}.{module}"
        if layer not in linears:
            raise refuse(
                f"the adapter is for {module}, which is no linear layer in the body of this model"
            )
        pairs.setdefault(layer, _Pair(module, {})).tensors[_ENDS[end]] = name
    if not pairs:
        raise refuse("the adapter has no weights")
    for module, found in pairs.values():
        for half in "AB":
            if half not in found:
                raise refuse(f"the adapter has no lora_{half} for {module}")
    return pairs


def _kind_of(name: str) -> str:
    """Say what a tensor that is no A or B of a linear layer belongs to."""
    if "lora_embedding" in name:
        return "adapted embeddings are not served"
    if "lora_magnitude_vector" in name:
        return "DoRA is not served"
    return "only lora_A and lora_B of linear layers are"


def _check_complete(
    pairs: Mapping[str, _Pair], linears: Mapping[str, LinearShape], config: PeftConfig
) -> None:
    """Raise InvalidRequestError if the adapter's own configuration says that it is for a layer of
    this model for which it has no weights: it belongs to another model."""
    bare = any(pair.module != layer for layer, pair in pairs.items())
    for layer in linears:
        module = layer.partition(".")[2] if bare else layer
        if layer not in pairs and config.targets(module):
            raise refuse(
                f"the adapter has no weights for {layer}, though its target_modules name it: it "
                "is for another model"
            )


def _check_pair(
    tensors: Any, pair: _Pair, shape: LinearShape, config: PeftConfig, max_rank: int | None
) -> None:
    """Raise InvalidRequestError if a layer's tensors have a wrong type or shape, or a rank that is
    too large."""
    module, names = pair
    rank = config.rank_of(module)
    if max_rank is not None and rank > max_rank:
        raise refuse(
            f"the adapter's rank for {module} is {rank}, over the maximum of {max_rank}: raise "
            "--max-lora-rank"
        )
    wanted = {"A": [rank, shape.in_features], "B": [shape.out_features, rank]}
    for half, name in names.items():
        found = tensors.get_slice(name)
        if found.get_dtype() not in _FLOATS:
            raise refuse(f"{name} has the type {found.get_dtype()}, which is no float type")
        if found.get_shape() != wanted[half]:
            raise refuse(
                f"{name} has the shape {found.get_shape()}, not {wanted[half]}: the adapter is "
                "for another model or damaged"
            )


def _read(tensors: Any, pair: _Pair, config: PeftConfig) -> LoraWeight:
    """Read a layer's weights. Raises InvalidRequestError if they are not finite."""
    # Copies, since what safetensors returns is the file itself, which may be written to later.
    a, b = (tensors.get_tensor(pair.tensors[half]).to(torch.float32, copy=True) for half in "AB")
    b *= config.scaling_of(pair.module)
    for half, tensor in (("A", a), ("B", b)):
        if not math.isfinite(tensor.abs().max().item()):
            raise refuse(f"{pair.tensors[half]} has numbers that are not finite")
    return LoraWeight(a.contiguous(), b.contiguous())
