"""Products of grouped linear layers on CUDA: a Triton kernel, or torch's float8 product.

Importing this loads Triton.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .....kernels.cuda.grouped_product import can_multiply
from .....kernels.cuda.tuning import compute_capability
from ....body.grouped_linear import GroupedLinear, GroupedWeight
from .kernels import Kernels

logger = logging.getLogger("quire.engine")


def use_products(model: nn.Module, kernels: Kernels) -> None:
    """Choose the product of each grouped layer below `model`, in place. A layer that none fits
    becomes dense."""
    chosen: Counter[str] = Counter()
    for layer in model.modules():
        if not isinstance(layer, GroupedLinear) or layer.multiply is not None:
            continue
        weight, kind = layer.grouped, layer.grouped.kind
        if multiplies_float8(weight, layer.dtype):
            layer.multiply = partial(multiply_float8, kernels)
            chosen[f"{kind} by torch's scaled product, inputs rounded by token"] += 1
        elif can_multiply(layer.in_features, weight.group_size):
            layer.multiply = partial(_multiply, kernels)
            chosen[f"{kind} by the grouped product"] += 1
        else:
            layer.multiply = _Dense(layer.weight)
            none = weight.quants.new_empty(0)
            layer.grouped = weight._replace(quants=none, minimum=None)
            chosen[f"{kind}, made dense: groups of {weight.group_size} fit no product"] += 1
    for what, number in sorted(chosen.items()):
        logger.info("%d linear layers multiply %s", number, what)


def multiplies_float8(weight: GroupedWeight, dtype: torch.dtype) -> bool:
    """Return whether torch multiplies this weight by float8 inputs: with a scale for each row, on
    GPUs of compute capability 8.9 and later, whose products have bfloat16 results."""
    rows, columns = weight.shape
    return (
        weight.kind == "float8"
        and weight.scale.shape[1] == 1
        and dtype == torch.bfloat16
        and rows % 16 == 0
        and columns % 16 == 0
        and compute_capability(weight.scale.device) >= 89
    )


def multiply_float8(
    kernels: Kernels, input: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return x Wᵀ + b, with each token of x rounded to float8 by a scale of its own: 448 is its
    greatest magnitude. Both scales are applied to the float32 sums."""
    rows = input.reshape(-1, input.shape[-1])
    quants = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    scale = rows.new_empty(len(rows), 1, dtype=torch.float32)
    kernels.quantize_rows(rows, quants, scale)
    product = F.scaled_mm(
        quants,
        weight.quants.T,
        scale,
        F.ScalingType.RowWise,
        weight.scale.T,
        F.ScalingType.RowWise,
        bias=None if bias is None else bias.to(torch.bfloat16),
        output_dtype=torch.bfloat16,
    )
    return product.to(input.dtype).view(*input.shape[:-1], -1)


def _multiply(
    kernels: Kernels, input: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    rows = input.reshape(-1, input.shape[-1])
    out = kernels.grouped_product(rows, weight.quants, weight.scale, weight.minimum, bias=bias)
    return out.view(*input.shape[:-1], -1)


class _Dense:
    """A product by a dense weight, which was made once."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(
        self, input: torch.Tensor, _: GroupedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return F.linear(input, self._weight, bias)
