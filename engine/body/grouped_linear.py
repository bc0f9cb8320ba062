"""Linear layers whose weights stay in the 4 or 8 bits of a quantised checkpoint.

Most formats of quantised weights are one form: a row is cut into groups of equal size, and a weight
is an integer times its group's scale, plus its group's minimum. The importers of files make
GroupedWeights; a device multiplies by them as they are, or makes them dense.
"""

from __future__ import annotations

from collections import abc
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class GroupedWeight(NamedTuple):
    """W[o, i] = scale[o, g] * q[o, i] + minimum[o, g] with g = i // group_size.

    `scale` and `minimum` are float32 `[out_features, in_features / group_size]`; `minimum` is None
    if it is zero everywhere. With 8 bits, `quants` holds q as int8 `[out_features, in_features]`,
    or as float8_e4m3fn if the device multiplies that. With 4 bits q is from 0 to 15, and `quants`
    is uint8 `[out_features, in_features / 2]`: byte j of a row holds q[2j] in its low half and
    q[2j + 1] in its high half.
    """

    quants: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return len(self.scale), self.scale.shape[1] * self.group_size

    @property
    def kind(self) -> str:
        """The kind of numbers, for people to read."""
        return "float8" if self.quants.is_floating_point() else f"{self.bits}-bit groups"

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the weight takes."""
        parts = (self.quants, self.scale, self.minimum)
        return sum(part.nbytes for part in parts if part is not None)

    def integers(self) -> torch.Tensor:
        """Return q, one in a byte: int8 `[out_features, in_features]`, or float8."""
        if self.bits == 8:
            return self.quants
        halves = torch.stack((self.quants & 15, self.quants >> 4), dim=-1)
        return halves.flatten(1).to(torch.int8)

    def dense(self) -> torch.Tensor:
        """Return W in float32 `[out_features, in_features]`."""
        rows, columns = self.shape
        groups = self.integers().float().view(rows, -1, self.group_size)
        groups *= self.scale[..., None]
        if self.minimum is not None:
            groups += self.minimum[..., None]
        return groups.view(rows, columns)

    def rows(self, which: slice | torch.Tensor) -> GroupedWeight:
        """Return some of the rows: as views if they are a slice, or those of indices `[n]`."""
        return self._replace(
            quants=self.quants[which],
            scale=self.scale[which],
            minimum=None if self.minimum is None else self.minimum[which],
        )

    def columns(self, which: slice) -> GroupedWeight:
        """Return one of several equal shares of the columns, as views; integers, scales and
        minimums stay what they are. Raises ValueError if a share is neither whole groups nor a
        part of one."""
        width = which.stop - which.start
        if self.group_size % width and width % self.group_size:
            raise ValueError(f"{width} columns cut groups of {self.group_size} apart")
        size = min(width, self.group_size)
        if self.bits == 4 and size % 2:
            raise ValueError(f"{size} columns of 4 bits are no whole bytes")
        weight = self.regrouped(size)
        packed = 2 if self.bits == 4 else 1
        groups = slice(which.start // size, which.stop // size)
        return weight._replace(
            quants=self.quants[:, which.start // packed : which.stop // packed],
            scale=weight.scale[:, groups],
            minimum=None if weight.minimum is None else weight.minimum[:, groups],
        )

    def copy(self) -> GroupedWeight:
        """Return a copy in memory of its own."""
        return self._replace(
            quants=self.quants.clone(memory_format=torch.contiguous_format),
            scale=self.scale.clone(memory_format=torch.contiguous_format),
            minimum=None
            if self.minimum is None
            else self.minimum.clone(memory_format=torch.contiguous_format),
        )

    def padded(self, missing: int) -> GroupedWeight:
        """Return the weight with so many rows of zeros after its own."""
        below = (0, 0, 0, missing)
        if self.quants.is_floating_point():
            octets = F.pad(self.quants.view(torch.uint8), below)
            quants = octets.view(self.quants.dtype)
        else:
            quants = F.pad(self.quants, below)
        return self._replace(
            quants=quants,
            scale=F.pad(self.scale, below),
            minimum=None if self.minimum is None else F.pad(self.minimum, below),
        )

    def regrouped(self, size: int) -> GroupedWeight:
        """Return the same weight in groups of `size`, which divides the present one."""
        repeats = self.group_size // size
        return self._replace(
            scale=self.scale.repeat_interleave(repeats, dim=1),
            minimum=None
            if self.minimum is None
            else self.minimum.repeat_interleave(repeats, dim=1),
            group_size=size,
        )

    def to(self, device: torch.device) -> GroupedWeight:
        """Return the weight on another device."""
        return self._replace(
            quants=self.quants.to(device),
            scale=self.scale.to(device),
            minimum=None if self.minimum is None else self.minimum.to(device),
        )

    def is_like(self, other: GroupedWeight) -> bool:
        """Whether rows of both can be stacked into one weight."""
        kinds = [
            (weight.kind, weight.group_size, weight.scale.shape[1], weight.minimum is None)
            for weight in (self, other)
        ]
        return kinds[0] == kinds[1]


def common_form(weights: abc.Sequence[GroupedWeight]) -> list[GroupedWeight]:
    """Return the same weights in one form, so that their rows can be stacked: with the most bits,
    the smallest groups, and minimums if any has them. Nothing is rounded."""
    bits = max(weight.bits for weight in weights)
    size = gcd(*(weight.group_size for weight in weights))
    has_minimum = any(weight.minimum is not None for weight in weights)
    found = []
    for weight in weights:
        if weight.bits < bits:
            weight = weight._replace(quants=weight.integers(), bits=bits)
        weight = weight.regrouped(size)
        if has_minimum and weight.minimum is None:
            weight = weight._replace(minimum=torch.zeros_like(weight.scale))
        found.append(weight)
    return found


def stack_rows(weights: abc.Sequence[GroupedWeight]) -> GroupedWeight:
    """Return the rows of all weights, which are alike, as one weight."""
    minimums = [weight.minimum for weight in weights if weight.minimum is not None]
    return weights[0]._replace(
        quants=torch.cat([weight.quants for weight in weights]),
        scale=torch.cat([weight.scale for weight in weights]),
        minimum=torch.cat(minimums) if minimums else None,
    )


class GroupedLinear(nn.Module):
    """y = x Wᵀ + b with a grouped W; x `[..., in_features]` → `[..., out_features]`, of its type.

    Its forward makes the weight dense in every call: this is the reference, and what the probe
    runs. A device's backend replaces the layer, or sets `multiply`, which gets x, the weight and
    the bias.
    """

    multiply: abc.Callable[[torch.Tensor, GroupedWeight, torch.Tensor | None], torch.Tensor] | None

    def __init__(
        self, grouped: GroupedWeight, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        """`dtype` is that of the model, for code that looks at the weight."""
        super().__init__()
        self.grouped, self.bias, self.dtype = grouped, bias, dtype
        self.out_features, self.in_features = grouped.shape
        self.multiply = None

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight `[out_features, in_features]`."""
        return self.grouped.dense().to(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.multiply is not None:
            return self.multiply(input, self.grouped, self.bias)
        return F.linear(input, self.weight.to(input.dtype), self.bias)


def dtype_of(linear: nn.Linear | GroupedLinear) -> torch.dtype:
    """Return the type of a layer's weight, without making a grouped one dense."""
    return linear.dtype if isinstance(linear, GroupedLinear) else linear.weight.dtype


def as_dense(linear: nn.Linear | GroupedLinear) -> nn.Linear:
    """Return the layer with a dense weight of the model's type; a plain layer itself."""
    if isinstance(linear, nn.Linear):
        return linear
    bias = linear.bias
    dense = nn.Linear(linear.in_features, linear.out_features, bias is not None, device="meta")
    dense.weight = nn.Parameter(linear.weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    return dense.eval()


def make_dense(model: nn.Module) -> None:
    """Replace every grouped layer below `model` by a plain one."""
    made: dict[nn.Module, nn.Linear] = {}  # a layer may be in two places
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GroupedLinear):
                made.setdefault(child, as_dense(child))
                setattr(module, name, made[child])
