"""Linear layers on the CPU whose weights are packed into panels, as `kernels.cpu.products`
multiplies them.

`F.linear` in float32 goes to MKL, which packs the weight again in every call. Importing this loads
Numba.
"""

from __future__ import annotations

from collections import abc

import numba
import numpy as np
import torch
from torch import nn

from ....kernels.cpu.arrays import FLOATS, as_array, thread_count
from ....kernels.cpu.panels import PANEL_COLUMNS
from ....kernels.cpu.products import (
    PackedWeight,
    make_quantised,
    make_segments,
    make_tiles,
    run_product,
)
from ....kernels.cpu.region import run_calls
from ...body.grouped_linear import GroupedLinear, dtype_of
from ...body.latent_layers import LatentProjection
from .packed_embedding import PackedEmbedding
from .packing import by_panel, emptied, pack, pack_weight, unpack


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with a packed W; x `[..., in_features]` → `[..., out_features]`, of its
    type."""

    def __init__(
        self,
        linear: nn.Linear | GroupedLinear,
        *,
        quantization: str | None = None,
        packed: PackedWeight | None = None,
    ) -> None:
        """Take over the weight of `linear`, which is emptied. `quantization` is that of `pack`;
        `packed` is the weight if it has been packed already."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._dtype = dtype_of(linear)
        self.packed = packed or pack(linear, quantization=quantization)

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight `[out_features, in_features]`, for code that looks at it."""
        return unpack(self.packed, self.out_features, self.in_features).to(self._dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(-1, self.in_features)
        out = torch.empty(len(rows), self.out_features)
        num_threads = thread_count()
        numba.set_num_threads(num_threads)
        run_product(self.packed, as_array(rows.float()), len(rows), out.numpy(), num_threads)
        return out.to(input.dtype).view(*input.shape[:-1], self.out_features)


class PackedHeads:
    """y_h = x_h W_hᵀ, a product of its own for each head, with a packed W; x `[heads, T,
    in_features]` → `[heads, T, out_features]`, of its type."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Pack a copy of a weight `[heads, out_features, in_features]`."""
        self._heads, self._out_features, _ = weight.shape
        # The rows of each head are filled up to whole panels.
        rows = torch.cat([by_panel(each, 1).flatten(0, 1) for each in weight])
        self._packed = pack_weight(rows, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        heads, tokens, in_features = x.shape
        rows = as_array(x.float()).reshape(-1, in_features)
        out = torch.empty(len(rows), self._out_features)
        num_threads = thread_count()
        numba.set_num_threads(num_threads)
        panels = -(-self._out_features // PANEL_COLUMNS)
        counts = np.full(heads, tokens, dtype=np.int64)
        segments, items = make_segments(np.arange(heads), counts, panels)
        room, tiles = make_quantised(0, 0, 0), make_tiles(num_threads)
        call = self._packed.multiply(rows, room, out.numpy(), tiles, False, segments)
        run_calls([(call, items)], len(rows), num_threads)
        return out.to(x.dtype).view(heads, tokens, -1)


class PackedProjection(nn.Module):
    """The products of a LatentProjection, packed. Implements HeadProducts, which states the
    contract."""

    def __init__(self, projection: LatentProjection) -> None:
        """Take over the weight of `projection`, which is emptied."""
        super().__init__()
        self.heads = projection.heads
        weight, nope_dim = projection.weight.detach(), self.heads.nope_dim
        self.absorb = PackedHeads(weight[:, :nope_dim].mT)
        self.expand = PackedHeads(weight[:, nope_dim:])
        projection.weight.data = projection.weight.new_empty(0)


def pack_linears(
    model: nn.Module,
    *,
    quantization: str | None = None,
    embeddings: abc.Sequence[PackedEmbedding] = (),
) -> None:
    """Replace every linear layer below `model`, plain or grouped, by a PackedLinear. The dense
    weight is freed, unless it is tied to an embedding. `quantization` is that of `pack`. A grouped
    layer that is tied to one of these embeddings has its panels. A LatentProjection is replaced by
    a PackedProjection, which is never quantised."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LatentProjection) and child.weight.dtype in FLOATS:
                setattr(module, name, PackedProjection(child))
            if type(child) is nn.Linear and child.weight.dtype not in FLOATS:
                continue
            if type(child) is nn.Linear or isinstance(child, GroupedLinear):
                packed = _packed_of(child, embeddings)
                layer = PackedLinear(child, quantization=quantization, packed=packed)
                setattr(module, name, layer)
    for embedding in embeddings:
        embedding.release()


def _packed_of(
    linear: nn.Linear | GroupedLinear, embeddings: abc.Sequence[PackedEmbedding]
) -> PackedWeight | None:
    """Return the panels of the embedding that a layer is tied to, if it is."""
    if not isinstance(linear, GroupedLinear) or linear.bias is not None:
        return None
    tied = [each for each in embeddings if each.source is linear.grouped.quants]
    if not tied:
        return None
    linear.grouped = emptied(linear.grouped)
    return tied[0].packed


def unmap_weights(model: nn.Module) -> None:
    """Copy the weights into memory of their own. As views of a mapped file, those that are not
    packed would keep all of it resident."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
