"""How ranks share LoRA adapters: the matrices of a layer are cut like its weight.

With y = W x + B A x, a layer whose output rows are cut has these rows of B and all of A; a layer
whose input columns are cut has these columns of A and all of B, and the sum over the ranks that
makes W x whole makes B A x whole, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..adapters.adapter import Adapter, LinearShape, LoraWeight


class LinearCut(NamedTuple):
    """The features of a whole linear layer, and which rows or columns a rank has of its weight;
    None for all."""

    in_features: int
    out_features: int
    rows: slice | None = None
    columns: slice | None = None


class AdapterCuts(NamedTuple):
    """How one rank's layers were cut, by their names in the whole model."""

    cuts: Mapping[str, LinearCut]

    def whole(self, linears: Mapping[str, LinearShape]) -> dict[str, LinearShape]:
        """Return the shapes of the whole layers, of which the rank has `linears`."""
        found = dict(linears)
        for name, cut in self.cuts.items():
            if name in found:
                found[name] = LinearShape(cut.in_features, cut.out_features)
        return found

    def part(self, adapter: Adapter) -> Adapter:
        """Return the rank's part of an adapter, in memory of its own if it was cut."""
        weights = {}
        for name, weight in adapter.weights.items():
            cut = self.cuts.get(name)
            if cut is not None and cut.rows is not None:
                weight = weight._replace(b=_copy(weight.b[cut.rows]))
            elif cut is not None and cut.columns is not None:
                weight = weight._replace(a=_copy(weight.a[:, cut.columns]))
            weights[name] = weight
        return adapter._replace(weights=weights)


WHOLE = AdapterCuts({})
"""Nothing is cut."""


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def pack_weight(weight: LoraWeight) -> tuple[int, bytes, bytes]:
    """Return a layer's weights as numbers: the rank, A and B in float32."""
    a, b = (half.contiguous().numpy().tobytes() for half in (weight.a, weight.b))
    return weight.rank, a, b


def unpack_weight(rank: int, a: bytes, b: bytes) -> LoraWeight:
    """Return the weights of which `pack_weight` made these numbers."""
    halves = [torch.frombuffer(bytearray(half), dtype=torch.float32) for half in (a, b)]
    return LoraWeight(halves[0].view(rank, -1), halves[1].view(-1, rank))
