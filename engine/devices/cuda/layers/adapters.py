"""Adapter slots on CUDA, at fixed addresses, so that captured graphs read whatever they hold.

Importing this loads Triton.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from .....kernels.cuda.lora import MAX_PARTS, rank_pad
from .....kernels.device_copy import StagingBuffer, upload_into
from ....adapters.adapted_linear import adapt
from ....adapters.adapter import Adapter
from ....adapters.slots import Adaptable, FlatNames, LoraLimits
from ....body.body import Body, FlatBody
from ....body.flat_decoder import Mlp
from .kernels import Kernels

if TYPE_CHECKING:
    from numpy.typing import NDArray


class CudaSlots:
    """AdapterSlots on CUDA: linear layers of the body, or products of the flat one, are replaced by
    AdaptedLinears."""

    def __init__(
        self,
        body: Body,
        adaptable: Adaptable,
        limits: LoraLimits,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        self.kernels = kernels
        self.limits = limits
        self.dtype, self.device = dtype, device
        self.is_active = False
        """Whether a token of the step that is launched has an adapter."""
        self._products: list[_Product] = []
        # `loc` and `order` of the kernels, one after the other.
        self._rows = StagingBuffer(limits.num_slots + 1 + limits.max_tokens, torch.int32, device)
        rows = self._rows.send(limits.num_slots + 1 + limits.max_tokens)
        self.loc, self.order = rows[: limits.num_slots + 1], rows[limits.num_slots + 1 :]
        shape = (MAX_PARTS, limits.max_tokens, rank_pad(limits.max_rank))
        self.h = torch.zeros(shape, dtype=torch.float32, device=device)
        if isinstance(body, FlatBody):
            self._adapt_flat(body, adaptable)
        else:
            self._adapt_modules(adaptable, adaptable.places.keys())
        # The device's side of all copies, so that filling a slot allocates nothing there.
        largest = max(product.largest for product in self._products)
        self.staging = torch.empty(largest, dtype=dtype, device=device)

    def _adapt_flat(self, body: FlatBody, adaptable: Adaptable) -> None:
        def adapted(linear: nn.Module, names: Sequence[str]) -> nn.Linear:
            # A flat layer only calls its linear layers, whatever they are.
            return cast(nn.Linear, adapt(linear, self._product(adaptable, names)))

        layers, known = [], set()
        for index, layer in enumerate(body.decoder.layers):
            names = FlatNames.of_layer(adaptable.prefix, index, layer)
            known |= {name for part in names for name in part}
            mlp = layer.mlp
            if isinstance(mlp, Mlp):
                mlp = mlp._replace(
                    gate_up=adapted(mlp.gate_up, names.gate_up), down=adapted(mlp.down, names.down)
                )
            layers.append(
                layer._replace(
                    qkv=adapted(layer.qkv, names.qkv),
                    output=adapted(layer.output, names.output),
                    mlp=mlp,
                )
            )
        body.decoder = body.decoder._replace(layers=layers)
        # What is left is beside the experts of mixtures, whose modules run as they are.
        self._adapt_modules(adaptable, adaptable.places.keys() - known)

    def _adapt_modules(self, adaptable: Adaptable, names: Set[str]) -> None:
        for name in sorted(names):
            place = adaptable.places[name]
            present = place.parent.get_submodule(place.attribute)
            product = self._product(adaptable, (name,))
            setattr(place.parent, place.attribute, adapt(present, product))

    def _product(self, adaptable: Adaptable, names: Sequence[str]) -> _Product:
        shapes = [adaptable.places[name].shape for name in names]
        sizes = tuple(shape.out_features for shape in shapes)
        product = _Product(self, names, shapes[0].in_features, sizes)
        self._products.append(product)
        return product

    @property
    def num_bytes(self) -> int:
        return sum(product.a.nbytes + product.b.nbytes for product in self._products)

    def write(self, slot: int, adapter: Adapter) -> None:
        for product in self._products:
            product.write(slot, adapter)

    def begin_step(self, token_slots: NDArray[np.int64] | None) -> None:
        self.is_active = token_slots is not None
        if token_slots is None:
            return
        rows = np.nonzero(token_slots >= 0)[0]
        slots = token_slots[rows]
        num_slots, packed = self.limits.num_slots, self._rows.open()
        packed[: num_slots + 1] = np.searchsorted(np.sort(slots), np.arange(num_slots + 1))
        packed[num_slots + 1 : num_slots + 1 + len(rows)] = rows[np.argsort(slots, kind="stable")]
        self._rows.send(num_slots + 1 + len(rows))

    def rehearse(self, *, active: bool) -> None:
        """Let the next step run with, or without, the kernels of adapters. It sends nothing, since
        the step may be recorded; before the first request no row has an adapter."""
        self.is_active = active


class _Product:
    """The slots of one product: an AddDeltas."""

    def __init__(
        self, owner: CudaSlots, names: Sequence[str], in_features: int, sizes: tuple[int, ...]
    ) -> None:
        slots, max_rank, _ = owner.limits
        device, dtype = owner.device, owner.dtype
        self._owner, self._names, self._sizes = owner, names, sizes
        self.a = torch.zeros(slots, len(sizes), max_rank, in_features, dtype=dtype, device=device)
        self.b = torch.zeros(slots, sum(sizes), max_rank, dtype=dtype, device=device)
        self.ranks = torch.zeros(slots, len(sizes), dtype=torch.int32, device=device)

    @property
    def largest(self) -> int:
        """The largest number of elements that is copied at a time."""
        return max(self.a[0, 0].numel(), max(self._sizes) * self.b.shape[2])

    @property
    def is_active(self) -> bool:
        return self._owner.is_active

    def add(self, x: torch.Tensor, out: torch.Tensor) -> None:
        owner = self._owner
        rows = (owner.order, owner.loc, self.ranks)
        owner.kernels.lora_shrink(x, self.a, *rows, owner.h)
        owner.kernels.lora_expand(owner.h, self.b, *rows, self._sizes, out)

    def write(self, slot: int, adapter: Adapter) -> None:
        ranks, left = [0] * len(self._sizes), 0
        for part, (name, size) in enumerate(zip(self._names, self._sizes, strict=True)):
            weight = adapter.weights.get(name)
            if weight is not None:
                rank = ranks[part] = weight.rank
                self._copy(self.a[slot, part, :rank], weight.a)
                self._copy(self.b[slot, left : left + size, :rank], weight.b)
            left += size
        upload_into(self.ranks[slot], torch.tensor(ranks, dtype=torch.int32))

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        staged = self._owner.staging[: source.numel()].view(source.shape)
        upload_into(staged, source.to(staged.dtype))
        target.copy_(staged)
