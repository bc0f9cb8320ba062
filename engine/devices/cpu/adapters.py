"""Adapter slots on the CPU: in a compiled decoder, or beside each linear layer of another body.

Importing this loads Numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

from ....kernels.cpu.arrays import thread_count
from ....kernels.cpu.lora.deltas import (
    AdaptedStep,
    LayerSlots,
    compile_deltas,
    find_runs,
    run_deltas,
)
from ....kernels.cpu.lora.slots import Slots
from ...adapters.adapted_linear import adapt
from ...adapters.adapter import Adapter
from ...adapters.slots import Adaptable, FlatNames, LoraLimits
from .decoder import CpuDecoder

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _allocate(
    adaptable: Adaptable, names: Sequence[str], num_layers: int, limits: LoraLimits
) -> Slots:
    """Allocate slots for a product whose parts have these names in the first of alike layers."""
    shapes = [adaptable.places[name].shape for name in names]
    sizes = [shape.out_features for shape in shapes]
    return Slots.allocate(
        limits.num_slots, num_layers, shapes[0].in_features, sizes, limits.max_rank
    )


def _write(
    slots: Slots,
    slot: int,
    layer: int,
    names: Sequence[str],
    adapter: Adapter,
    factor: float = 1.0,
) -> None:
    """Put an adapter's weights for the layers with these names, the parts of one product, into a
    slot, so that what they add is multiplied by `factor`."""
    for part, name in enumerate(names):
        weight = adapter.weights.get(name)
        weights = None if weight is None else (weight.a.numpy(), (weight.b * factor).numpy())
        slots.write(slot, layer, part, weights)


class DecoderSlots:
    """AdapterSlots of a CpuDecoder: phases of its parallel region."""

    def __init__(self, decoder: CpuDecoder, adaptable: Adaptable, limits: LoraLimits) -> None:
        assert adaptable.flat is not None
        layers = adaptable.flat.layers
        num_layers = len(layers)
        self._names = [
            FlatNames.of_layer(adaptable.prefix, index, layer) for index, layer in enumerate(layers)
        ]
        self._update_scales = [layer.update_scale for layer in layers]
        self._slots = LayerSlots(
            *(_allocate(adaptable, parts, num_layers, limits) for parts in self._names[0])
        )
        self._step = AdaptedStep(self._slots, limits.max_rank)
        compile_deltas()
        decoder.adapted = self._step

    @property
    def num_bytes(self) -> int:
        return sum(slots.num_bytes for slots in self._slots)

    def write(self, slot: int, adapter: Adapter) -> None:
        for layer, names in enumerate(self._names):
            scale = self._update_scales[layer]  # which is in the weights of the two updates
            scales = (1.0, scale, 1.0, scale)
            for slots, parts, factor in zip(self._slots, names, scales, strict=True):
                _write(slots, slot, layer, parts, adapter, factor)

    def begin_step(self, token_slots: NDArray[np.int64] | None) -> None:
        self._step.begin(token_slots)


class _LinearSlots:
    """The slots of one linear layer: an AddDeltas."""

    def __init__(self, owner: ModuleSlots, slots: Slots) -> None:
        self.slots = slots
        self._owner = owner

    @property
    def is_active(self) -> bool:
        return len(self._owner.runs) > 0

    def add(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if len(x) != self._owner.num_tokens:
            raise RuntimeError(f"a layer with adapters got {len(x)} tokens of a step")
        num_threads = thread_count()
        numba.set_num_threads(num_threads)
        deltas = torch.empty(len(x), out.shape[1])
        floats = x.float().contiguous().numpy()
        run_deltas(self.slots, floats, deltas.numpy(), self._owner.runs, num_threads)
        for _, first, count in self._owner.runs.tolist():
            out[first : first + count] += deltas[first : first + count]


class ModuleSlots:
    """AdapterSlots of a body that runs as transformers' own code: its linear layers are replaced
    by AdaptedLinears."""

    def __init__(self, adaptable: Adaptable, limits: LoraLimits) -> None:
        self.runs = find_runs(np.empty(0, np.int64))
        """The runs of the present step; none if no token has an adapter."""
        self.num_tokens = 0
        compile_deltas()
        self._linears: dict[str, _LinearSlots] = {}
        for name, place in adaptable.places.items():
            slots = _allocate(adaptable, (name,), 1, limits)
            self._linears[name] = linear = _LinearSlots(self, slots)
            # Not the layer that was found: the backend has put a packed one into its place.
            present = place.parent.get_submodule(place.attribute)
            setattr(place.parent, place.attribute, adapt(present, linear))

    @property
    def num_bytes(self) -> int:
        return sum(linear.slots.num_bytes for linear in self._linears.values())

    def write(self, slot: int, adapter: Adapter) -> None:
        for name, linear in self._linears.items():
            _write(linear.slots, slot, 0, (name,), adapter)

    def begin_step(self, token_slots: NDArray[np.int64] | None) -> None:
        slots = np.empty(0, np.int64) if token_slots is None else token_slots
        self.runs, self.num_tokens = find_runs(slots), len(slots)
