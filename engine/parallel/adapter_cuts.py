"""How ranks share LoRA adapters: the matrices of a layer are cut like its weight.

With y = W x + B A x, a layer whose output rows are cut has these rows of B and all of A; a layer
whose input columns are cut has these columns of A and all of B, and the sum over the ranks that
makes W x whole makes B A x whole, too. A stage of a pipeline has the matrices of its layers, which
count from 0 there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..adapters.adapter import Adapter, LinearShape, LoraWeight
from .ranks import Ranks


class LinearCut(NamedTuple):
    """Which rows or columns a rank has of a linear layer's weight; None for all."""

    rows: slice | torch.Tensor | None = None
    columns: slice | None = None


class AdapterCuts(NamedTuple):
    """How the layers of a model lie on one rank.

    `cuts` says how linear layers were cut, by the names that they have on this rank. `linears` are
    the shapes of all linear layers of the whole model, by their names there. Of a pipeline, the
    rank has the layers `stage` of the body that is named `prefix`.
    """

    cuts: Mapping[str, LinearCut]
    linears: Mapping[str, LinearShape]
    prefix: str = ""
    stage: range | None = None

    def agree(self, own: Mapping[str, LinearShape], ranks: Ranks) -> dict[str, LinearShape]:
        """Return the shapes of the whole layers that can have adapters on any rank; `own` are this
        rank's. All ranks ask this at once."""
        if ranks.size == 1:
            return dict(own)
        numbers = {name: number for number, name in enumerate(self.linears)}
        votes = ranks.agree([numbers[self.whole_name(name)] for name in own])
        found = {number for vote in votes for number in vote}
        return {name: self.linears[name] for name, number in numbers.items() if number in found}

    def whole_name(self, name: str) -> str:
        """Return the name in the whole model of a layer that this rank has under `name`."""
        return name if self.stage is None else self._renumbered(name, self.stage.start)

    def own_name(self, name: str) -> str | None:
        """Return the name on this rank of a layer of the whole model; None if another stage has
        it."""
        if self.stage is None:
            return name
        number = self._layer(name)
        if number is not None and number not in self.stage:
            return None
        return self._renumbered(name, -self.stage.start)

    def part(self, adapter: Adapter) -> Adapter:
        """Return the rank's part of an adapter, in memory of its own if it was cut."""
        weights = {}
        for name, weight in adapter.weights.items():
            own = self.own_name(name)
            if own is None:
                continue
            cut = self.cuts.get(own)
            if cut is not None and cut.rows is not None:
                weight = weight._replace(b=_copy(weight.b[cut.rows]))
            elif cut is not None and cut.columns is not None:
                weight = weight._replace(a=_copy(weight.a[:, cut.columns]))
            weights[own] = weight
        return adapter._replace(weights=weights)

    def _layer(self, name: str) -> int | None:
        """Return the number of the layer that a name begins with; None for what is in no layer."""
        before, number, _ = self._split(name)
        return int(number) if before else None

    def _renumbered(self, name: str, more: int) -> str:
        before, number, rest = self._split(name)
        return f"{before}{int(number) + more}.{rest}" if before else name

    def _split(self, name: str) -> tuple[str, str, str]:
        """Return what precedes a layer's number in a name, the number and the rest; nothing first
        if there is none."""
        before = f"{self.prefix}.layers."
        if not name.startswith(before):
            return "", "", name
        number, _, rest = name.removeprefix(before).partition(".")
        return before, number, rest


WHOLE = AdapterCuts({}, {})
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
