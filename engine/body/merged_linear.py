"""Merges linear layers that get the same input into one product.

Q, K and V of an attention, gate and up of an MLP are small products over one input; one larger
product reads it once and costs one call. They are found by watching a forward, not by name: plain
linear layers of one module that were each called once, with the same tensor. The modules' own code
stays as it is: each layer is replaced by one that returns its own columns, and computes the whole
product if it is the first to be called.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

logger = logging.getLogger("quire.engine")


class Siblings(NamedTuple):
    """Linear children of one module that share their input, in the order of their calls."""

    parent: nn.Module
    names: tuple[str, ...]


class MergedLinear(nn.Module):
    """The stacked product of several linear layers over one input."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        first = linears[0]
        self.sizes = [linear.out_features for linear in linears]
        self.linear = nn.Linear(
            first.in_features, sum(self.sizes), first.bias is not None, device="meta"
        )
        weights: list[torch.Tensor] = [linear.weight for linear in linears]
        self.linear.weight = _stacked(weights)
        if first.bias is not None:
            self.linear.bias = _stacked([linear.bias for linear in linears])
        self.linear.eval()
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()
        self._to_hand_out = 0

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x `[..., in_features]` → for each layer, its columns `[..., size]`, all views of one
        tensor."""
        return torch.split(self.linear(input), self.sizes, dim=-1)

    def column(self, index: int, input: torch.Tensor) -> torch.Tensor:
        """Return one layer's columns, computed with the others' unless this very tensor was the
        last input. Nothing is kept once each layer has had its columns."""
        if input is not self._input:
            self._outputs = self(input)
            self._input, self._to_hand_out = input, len(self.sizes)
        output = self._outputs[index]
        self._to_hand_out -= 1
        if self._to_hand_out == 0:
            self._input, self._outputs = None, ()
        return output


class LinearColumn(nn.Module):
    """Stands in for layer `index` of a merged product."""

    def __init__(self, merged: MergedLinear, index: int, linear: nn.Linear) -> None:
        super().__init__()
        self.merged, self.index = merged, index
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The layer's weight `[out_features, in_features]`, for code that looks at it."""
        return torch.split(self.merged.linear.weight, self.merged.sizes)[self.index]

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias `[out_features]`, if it has one."""
        bias: torch.Tensor | None = self.merged.linear.bias
        return None if bias is None else torch.split(bias, self.merged.sizes)[self.index]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.merged.column(self.index, input)


def merge_siblings(body: nn.Module, run: Callable[[], object]) -> list[tuple[str, ...]]:
    """Merge linear layers below `body`, which `run` runs once. Returns the names in each group.

    If the model's code cannot work with columns of a wider tensor, nothing is merged.
    """
    groups = _find_siblings(body, run)
    for siblings in groups:
        _merge(siblings)
    try:
        run()
    except RuntimeError as error:  # such as a view across rows
        logger.info("projections are not merged: %s", error)
        for siblings in groups:
            _unmerge(siblings)
        return []
    return [siblings.names for siblings in groups]


def _find_siblings(body: nn.Module, run: Callable[[], object]) -> list[Siblings]:
    # 1. Watch every plain linear layer while `run` runs the body.
    parents = {
        child: (parent, name)
        for parent in body.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    }
    calls: list[tuple[nn.Linear, torch.Tensor, int]] = []  # holds the inputs, so that ids differ

    def watch(linear: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        if arguments:  # otherwise it is given by name, which no model does
            calls.append((linear, arguments[0], arguments[0]._version))

    hooks = [linear.register_forward_pre_hook(watch) for linear in parents]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    # 2. Group those that were called once, by parent, input (and its version: it may be changed in
    # place) and kind of weight.
    counts = Counter(linear for linear, _, _ in calls)
    groups: dict[tuple[object, ...], list[nn.Linear]] = {}
    for linear, input, version in calls:
        if counts[linear] == 1:
            alike = (linear.weight.dtype, linear.weight.device, linear.bias is not None)
            key = (parents[linear][0], id(input), version, *alike)
            groups.setdefault(key, []).append(linear)
    return [
        Siblings(parents[linears[0]][0], tuple(parents[linear][1] for linear in linears))
        for linears in groups.values()
        if len(linears) > 1
    ]


def _merge(siblings: Siblings) -> None:
    """Replace the siblings in their parent. For a moment their weights exist twice."""
    parent, names = siblings
    linears: list[nn.Linear] = [parent.get_submodule(name) for name in names]  # type: ignore[misc]
    merged = MergedLinear(linears)
    for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
        setattr(parent, name, LinearColumn(merged, index, linear))


def _unmerge(siblings: Siblings) -> None:
    """Put plain layers back, whose weights are views of the merged one."""
    parent, names = siblings
    for name in names:
        column: LinearColumn = parent.get_submodule(name)  # type: ignore[assignment]
        weight, bias = column.weight, column.bias
        linear = nn.Linear(column.in_features, column.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        setattr(parent, name, linear.eval())


def _stacked(parts: list[torch.Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat(parts).detach(), requires_grad=False)
