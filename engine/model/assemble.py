"""Builds a transformers model from a checkpoint that quire reads by itself.

The model is made without memory for its parameters, and each gets its weight from the checkpoint.
A linear layer whose weight stays in groups becomes a GroupedLinear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..body.grouped_linear import GroupedLinear, GroupedWeight
from ..body.grouped_rows import GroupedEmbedding, GroupedStack
from ..checkpoints.checkpoint import Checkpoint, WeightFacts
from ..errors import ModelLoadError


def assemble(
    checkpoint: Checkpoint,
    build: Callable[[], Any],
    dtype: torch.dtype,
    *,
    keep_groups: bool,
    keep_float8: bool = False,
    keep_rows: bool = False,
) -> Any:
    """Return the model that `build` makes, with the checkpoint's weights of `dtype` on the CPU. For
    `keep_groups` and so on see `Checkpoint.weights`.

    Raises ModelLoadError if a parameter gets no weight, or one of another shape.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = build()
    model.tie_weights()
    parameters = dict(model.named_parameters()).keys()
    tied = []
    weights = checkpoint.weights(
        model, keep_groups=keep_groups, keep_float8=keep_float8, keep_rows=keep_rows
    )
    for name, weight in weights:
        module = model.get_submodule(name.rpartition(".")[0])
        is_tied = name not in parameters or isinstance(module, nn.Embedding)
        if is_tied and isinstance(weight, GroupedWeight):
            tied.append((name, weight))
        else:
            _set_weight(model, name, weight, dtype)
    model.tie_weights()
    for name, weight in tied:  # after tying, which could not be done with it
        _set_weight(model, name, weight, dtype)
    checkpoint.finish(model)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ModelLoadError(f"{len(empty)} weights are missing, the first {empty[0]}")
    return model


def _set_weight(
    model: Any, name: str, weight: torch.Tensor | GroupedWeight, dtype: torch.dtype
) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    shape = expected = tuple(getattr(module, attribute).shape)
    if isinstance(weight, GroupedWeight) and len(expected) == 3:
        shape = (expected[0] * expected[1], expected[2])
    if tuple(weight.shape) != shape:
        raise ModelLoadError(f"{name} has the shape {tuple(weight.shape)}, not {expected}")
    if isinstance(weight, torch.Tensor):
        setattr(module, attribute, nn.Parameter(weight.to(dtype), requires_grad=False))
    elif isinstance(module, nn.Linear):  # a bias is set after its weight, in the grouped layer
        model.set_submodule(path, GroupedLinear(weight, module.bias, dtype))
    elif isinstance(module, nn.Embedding):
        scale = torch.as_tensor(getattr(module, "embed_scale", 1.0)).to(dtype)
        model.set_submodule(path, GroupedEmbedding(weight, dtype, float(scale)))
    else:
        delattr(module, attribute)
        setattr(module, attribute, GroupedStack(weight, expected[0], dtype))
        model.set_experts_implementation("eager")  # the one that asks for an expert's weight


def weight_facts(
    model: Any,
    source_format: str,
    quantization: str | None,
    bytes_of: Callable[[torch.Tensor | GroupedWeight, str | None], int],
) -> WeightFacts:
    """Return what is to be told of a loaded model's weights, whose plain linear layers and experts
    are about to be rounded as `quantization` says. `bytes_of` is `Backend.weight_bytes`. A tied
    weight counts once, but if it has two forms both of them take memory.
    """
    head = model.get_output_embeddings()
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    rounded = {} if quantization is None else _rounded_weights(model, head, quantization)
    number, sizes = 0, Counter[str]()
    for parameter in model.parameters():
        number += parameter.numel()
        kind, size = str(parameter.dtype), parameter.nbytes
        if parameter in rounded:
            kind, rows = rounded[parameter]
            size = bytes_of(rows, kind)
        sizes[kind.removeprefix("torch.")] += size
        if tied and parameter in rounded and parameter is head.weight:
            sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    seen: set[int] = set()
    for module, grouped in _grouped_weights(model):
        if id(grouped.quants) not in seen:  # else it is the embedding's own
            seen.add(id(grouped.quants))
            sizes[grouped.kind] += bytes_of(grouped, None)
        if not (module is head and tied):
            number += grouped.shape[0] * grouped.shape[1]
    computed = ", ".join(name for name, _ in sizes.most_common())
    return WeightFacts(source_format, computed, number, sizes.total())


def _grouped_weights(model: nn.Module) -> Iterator[tuple[nn.Module, GroupedWeight]]:
    for module in model.modules():
        if isinstance(module, GroupedLinear | GroupedEmbedding):
            yield module, module.grouped
        for value in vars(module).values():
            if isinstance(value, GroupedStack):
                yield module, value.grouped


def _rounded_weights(
    model: Any, head: nn.Module, quantization: str
) -> dict[torch.Tensor, tuple[str, torch.Tensor]]:
    """Return how each weight that is going to be rounded is computed, and its rows `[out_features,
    in_features]`; of experts, those of all of them."""
    found: dict[torch.Tensor, tuple[str, torch.Tensor]] = {}
    for parent in model.modules():
        children = list(parent.children())
        experts = [child for child in children if hasattr(child, "is_transposed")]
        num_experts = {child.num_experts for child in experts}
        for child in children:
            if type(child) is nn.Linear and len(child.weight) not in num_experts:  # no router
                found[child.weight] = "int8" if child is head else quantization, child.weight
        for child in experts:
            for weight in child.parameters(recurse=False):
                if weight.ndim == 3:
                    rows = weight.mT if child.is_transposed else weight
                    found[weight] = quantization, rows.flatten(0, 1)
    return found
