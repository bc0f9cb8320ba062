"""A linear layer that adds what the adapters of a step's tokens add."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn


class AddDeltas(Protocol):
    """Adds the adapters' part to one product."""

    @property
    def is_active(self) -> bool:
        """Whether any token of the present step has an adapter."""

    def add(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add B A x to the rows of `out` `[T, out_features]` whose tokens have an adapter; x is
        `[T, in_features]`."""


def adapt(linear: nn.Module, deltas: AddDeltas) -> nn.Module:
    """Return a layer that adds what adapters add. If its outputs are summed over the ranks of a
    model, `linear` itself does, to what is summed: each rank's part of B A x is a term of it."""
    if not getattr(linear, "sums_ranks", False):
        return AdaptedLinear(linear, deltas)
    linear.linear = AdaptedLinear(linear.get_submodule("linear"), deltas)
    return linear


class AdaptedLinear(nn.Module):
    """Stands in for a linear layer; x `[..., in_features]` → `[..., out_features]`."""

    def __init__(self, linear: nn.Module, deltas: AddDeltas) -> None:
        super().__init__()
        self.linear, self.deltas = linear, deltas
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own weight, for code that looks at it."""
        weight: torch.Tensor = self.linear.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's own bias, if it has one."""
        bias: torch.Tensor | None = self.linear.bias  # type: ignore[assignment]
        return bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(input)
        if self.deltas.is_active:
            self.deltas.add(input.reshape(-1, input.shape[-1]), out.view(-1, out.shape[-1]))
        return out
