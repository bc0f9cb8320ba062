"""Linear layers on the CPU whose weights are packed into panels, as `kernels.cpu.products`
multiplies them.

`F.linear` in float32 goes to MKL, which packs the weight again in every call. Importing this loads
Numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ....kernels.cpu.arrays import FLOATS, as_array, thread_count
from ....kernels.cpu.panels import PANEL_COLUMNS
from ....kernels.cpu.products import run_product

if TYPE_CHECKING:
    from numpy.typing import NDArray


def pack(
    linears: Sequence[nn.Linear], parts: int = 1, *, int8: bool = False
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Pack the weights of layers of one shape, and empty those of the layers.

    Returns panels `[linears, panels, in_features, PANEL_COLUMNS]`, and scale and bias of their
    columns `[linears, 2, panels * PANEL_COLUMNS]`. The columns are split into `parts`, whose panels
    take turns (gate, up, gate, …). With `int8`, a column's weights are the nearest multiples of a
    127th of its greatest one.
    """
    first = linears[0]
    columns, depth = first.out_features // parts, first.in_features
    panels = -(-columns // PANEL_COLUMNS)
    dtype = torch.int8 if int8 else first.weight.dtype
    weights = torch.zeros(len(linears), panels, parts, depth, PANEL_COLUMNS, dtype=dtype)
    affine = torch.zeros(len(linears), 2, panels, parts, PANEL_COLUMNS)
    padding = panels * PANEL_COLUMNS - columns

    def by_panel(row: torch.Tensor) -> torch.Tensor:
        row = F.pad(row.detach().float().view(parts, columns), (0, padding))
        return row.view(parts, panels, PANEL_COLUMNS).transpose(0, 1)

    for layer, linear in enumerate(linears):
        weight, scale = linear.weight.detach(), torch.ones(linear.out_features)
        if int8:
            scale = weight.float().abs().amax(dim=1) / 127
            scale[scale == 0] = 1.0
            weight = (weight.float() / scale[:, None]).round_()
        rows = F.pad(weight.view(parts, columns, depth), (0, 0, 0, padding))
        weights[layer] = rows.view(parts, panels, PANEL_COLUMNS, depth).permute(1, 0, 3, 2)
        affine[layer, 0] = by_panel(scale)
        if linear.bias is not None:
            affine[layer, 1] = by_panel(linear.bias)
        linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
    return as_array(weights.flatten(1, 2)), affine.flatten(2).numpy()


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with a packed W; x `[..., in_features]` → `[..., out_features]`, of its
    type."""

    def __init__(self, linear: nn.Linear, *, int8: bool = False) -> None:
        """Take over the weight of `linear`, which is emptied. `int8` is that of `pack`."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._dtype = linear.weight.dtype
        panels, affine = pack([linear], int8=int8)
        self.panels, self.affine = panels[0], affine[0]

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight `[out_features, in_features]`, for code that looks at it."""
        panels = torch.from_numpy(self.panels)
        if panels.dtype == torch.int8:
            scales = torch.from_numpy(self.affine[0]).view(len(panels), 1, PANEL_COLUMNS)
            panels = (panels * scales).to(self._dtype)
        panels = panels.view(self._dtype)
        return panels.transpose(1, 2).reshape(-1, self.in_features)[: self.out_features]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(-1, self.in_features)
        out = torch.empty(len(rows), self.out_features)
        num_threads = thread_count()
        numba.set_num_threads(num_threads)
        arrays = (
            self.panels,
            self.affine,
            as_array(rows.float()),
            len(rows),
            out.numpy(),
            num_threads,
        )
        run_product(*arrays)
        return out.to(input.dtype).view(*input.shape[:-1], self.out_features)


def pack_linears(model: nn.Module, *, int8: bool = False) -> None:
    """Replace every plain nn.Linear below `model` by a PackedLinear. The dense weight is freed,
    unless it is tied to an embedding. `int8` is that of `pack`."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.dtype in FLOATS:
                setattr(module, name, PackedLinear(child, int8=int8))


def unmap_weights(model: nn.Module) -> None:
    """Copy the weights into memory of their own. As views of a mapped file, those that are not
    packed would keep all of it resident."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
