"""Builds a transformers model from a checkpoint that quire reads by itself.

The model is made without memory for its parameters, and each gets its weight from the checkpoint.
A linear layer whose weight stays in groups becomes a GroupedLinear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn

from ..body.grouped_linear import GroupedLinear, GroupedWeight
from ..checkpoints.checkpoint import Checkpoint, WeightFacts
from ..errors import ModelLoadError


def assemble(
    checkpoint: Checkpoint,
    build: Callable[[], Any],
    dtype: torch.dtype,
    *,
    keep_groups: bool,
    keep_float8: bool = False,
) -> Any:
    """Return the model that `build` makes, with the checkpoint's weights of `dtype` on the CPU.

    Raises ModelLoadError if a parameter gets no weight, or one of another shape.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = build()
    model.tie_weights()
    parameters = dict(model.named_parameters()).keys()
    tied = []
    weights = checkpoint.weights(model, keep_groups=keep_groups, keep_float8=keep_float8)
    for name, weight in weights:
        if name in parameters:
            _set_weight(model, name, weight, dtype)
        else:
            tied.append((name, weight))
    model.tie_weights()
    for name, weight in tied:  # after tying, which could not be done with it
        _set_weight(model, name, weight, dtype)
    checkpoint.finish(model)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ModelLoadError(f"{len(empty)} weights are missing, the first {empty[0]}")
    return model


def _set_weight(
    model: nn.Module, name: str, weight: torch.Tensor | GroupedWeight, dtype: torch.dtype
) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    expected = tuple(getattr(module, attribute).shape)
    if tuple(weight.shape) != expected:
        raise ModelLoadError(f"{name} has the shape {tuple(weight.shape)}, not {expected}")
    if isinstance(weight, torch.Tensor):
        setattr(module, attribute, nn.Parameter(weight.to(dtype), requires_grad=False))
        return
    # A bias is set after its weight, in the grouped layer.
    assert isinstance(module, nn.Linear)
    model.set_submodule(path, GroupedLinear(weight, module.bias, dtype))


def weight_facts(model: Any, source_format: str, quantization: str | None) -> WeightFacts:
    """Return what is to be told of a loaded model's weights, whose plain linear layers and experts
    are about to be rounded as `quantization` says. A tied weight counts once, but both of its
    forms take memory.
    """
    head = model.get_output_embeddings()
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    rounded = {} if quantization is None else _rounded_weights(model, head, quantization)
    number, sizes = 0, Counter[str]()
    for parameter in model.parameters():
        number += parameter.numel()
        kind, size = rounded.get(parameter, (str(parameter.dtype), parameter.nbytes))
        sizes[kind.removeprefix("torch.")] += size
        if tied and parameter in rounded and parameter is head.weight:
            sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    for module in model.modules():
        if isinstance(module, GroupedLinear):
            sizes[module.grouped.kind] += module.grouped.num_bytes
            if not (module is head and tied):
                number += module.in_features * module.out_features
    computed = ", ".join(name for name, _ in sizes.most_common())
    return WeightFacts(source_format, computed, number, sizes.total())


def _rounded_weights(
    model: Any, head: nn.Module, quantization: str
) -> dict[torch.Tensor, tuple[str, int]]:
    """Return how each weight that is going to be rounded is computed, and in how many bytes."""
    found: dict[torch.Tensor, tuple[str, int]] = {}
    for parent in model.modules():
        children = list(parent.children())
        experts = [child for child in children if hasattr(child, "is_transposed")]
        num_experts = {child.num_experts for child in experts}
        for child in children:
            if type(child) is nn.Linear and len(child.weight) not in num_experts:  # no router
                kind = "int8" if child is head else quantization
                found[child.weight] = kind, _rounded_bytes(child.weight.shape, kind)
        for child in experts:
            for weight in child.parameters(recurse=False):
                if weight.ndim == 3:
                    shape = weight.mT.shape if child.is_transposed else weight.shape
                    found[weight] = quantization, _rounded_bytes(shape, quantization)
    return found


def _rounded_bytes(shape: torch.Size, kind: str) -> int:
    """Return the bytes of a weight `[…, out_features, in_features]`: of 8 bits and a scale a row,
    or of 4 bits, and a scale and a minimum of 16 bits for each 32."""
    *outer, columns = shape
    rows = prod(outer)
    return rows * (columns + 4 if kind == "int8" else -(-columns // 32) * 20)
