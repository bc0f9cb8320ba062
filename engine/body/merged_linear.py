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

from .grouped_linear import GroupedLinear, as_dense, common_form, dtype_of, stack_rows

logger = logging.getLogger("quire.engine")


class Siblings(NamedTuple):
    """Linear children of one module that share their input, in the order of their calls."""

    parent: nn.Module
    names: tuple[str, ...]


Linear = nn.Linear | GroupedLinear


class MergedLinear(nn.Module):
    """The stacked product of several linear layers over one input. If all of their weights are
    grouped, so is the stacked one; the dense ones among others make all of them dense."""

    def __init__(self, linears: list[Linear]) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.linear = _stack(linears)
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

    def __init__(self, merged: MergedLinear, index: int, linear: Linear) -> None:
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
        if type(child) in (nn.Linear, GroupedLinear)
    }
    calls: list[tuple[Linear, torch.Tensor, int]] = []  # holds the inputs, so that ids differ

    def watch(linear: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(linear, Linear)
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
    groups: dict[tuple[object, ...], list[Linear]] = {}
    for linear, input, version in calls:
        if counts[linear] == 1:
            alike = (dtype_of(linear), linear.bias is not None)
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
    linears: list[Linear] = [parent.get_submodule(name) for name in names]  # type: ignore[misc]
    merged = MergedLinear(linears)
    for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
        setattr(parent, name, LinearColumn(merged, index, linear))


def _unmerge(siblings: Siblings) -> None:
    """Put single layers back, whose weights are views of the merged one."""
    parent, names = siblings
    for name in names:
        column: LinearColumn = parent.get_submodule(name)  # type: ignore[assignment]
        setattr(parent, name, _single(column))


def _single(column: LinearColumn) -> Linear:
    """Return the layer that a column stands in for."""
    merged, bias = column.merged, column.bias
    if isinstance(merged.linear, GroupedLinear):
        begin = sum(merged.sizes[: column.index])
        rows = slice(begin, begin + merged.sizes[column.index])
        return GroupedLinear(merged.linear.grouped.rows(rows), bias, merged.linear.dtype)
    linear = nn.Linear(column.in_features, column.out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(column.weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.eval()


def _stack(linears: list[Linear]) -> Linear:
    """Return the layer whose rows are those of all layers."""
    first = linears[0]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    grouped = [linear.grouped for linear in linears if isinstance(linear, GroupedLinear)]
    if len(grouped) == len(linears):
        bias = torch.cat(biases) if biases else None
        return GroupedLinear(stack_rows(common_form(grouped)), bias, dtype_of(first))
    size = sum(linear.out_features for linear in linears)
    stacked = nn.Linear(first.in_features, size, bool(biases), device="meta")
    stacked.weight = _stacked([as_dense(linear).weight for linear in linears])
    if biases:
        stacked.bias = _stacked(biases)
    return stacked.eval()


def _stacked(parts: list[torch.Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat(parts).detach(), requires_grad=False)
