"""The weights of linear layers as panels: floats, or integers of 4 and 8 bits.

Importing this loads Numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ....kernels.cpu.arrays import as_array
from ....kernels.cpu.integer.dots import ZERO_OF_BYTES
from ....kernels.cpu.integer.groups import UNIT
from ....kernels.cpu.integer.products import IntegerWeight
from ....kernels.cpu.panels import PANEL_COLUMNS
from ....kernels.cpu.products import FloatWeight, PackedWeight
from ...body.grouped_linear import GroupedLinear, GroupedWeight

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUP = 32
"""Features of a group: of weights of 4 bits, and of x for weights with a scale a column."""
MAX_GROUP = 256
"""Maximum features of x that share a step."""
_LEAST_NORMAL_HALF = 2.0**-14
_NONE: NDArray[Any] = np.zeros((0, 0, 0), np.uint8)
_MINUS_EIGHT: NDArray[Any] = np.zeros((0, 0, 0), np.int8)
"""In place of minimums: none, and -8 times the scale. See `IntegerProduct`."""


def pack(
    linear: nn.Linear | GroupedLinear, parts: int = 1, *, quantization: str | None = None
) -> PackedWeight:
    """Pack the weight of a layer, and empty that of the layer.

    The columns are split into `parts`, whose panels take turns (gate, up, gate, …). A grouped
    weight keeps its integers. Any other is rounded as `quantization` says: int8 makes of a column's
    weights the nearest multiples of a 127th of its greatest one, int4 is `round_to_int4`.
    """
    if isinstance(linear, GroupedLinear):
        packed = pack_weight(linear.grouped, linear.bias, parts)
        none = torch.empty(0, 1)
        linear.grouped = linear.grouped._replace(quants=none, scale=none, minimum=None)
        return packed
    weight, bias = linear.weight.detach(), linear.bias
    packed = pack_weight(rounded(weight, quantization), bias, parts)
    linear.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return packed


def rounded(weight: torch.Tensor, quantization: str | None) -> torch.Tensor | GroupedWeight:
    """Return a weight `[out_features, in_features]` as `quantization` says: see `pack`."""
    if quantization == "int8":
        return round_to_int8(weight)
    return round_to_int4(weight) if quantization == "int4" else weight


def round_to_int8(weight: torch.Tensor) -> GroupedWeight:
    """Round to 8 bits, with a scale for each row."""
    weight = _filled(weight.float())
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    scale[scale == 0] = 1.0
    quants = (weight / scale).round_().to(torch.int8)
    return GroupedWeight(quants, scale, None, 8, weight.shape[1])


def round_to_int4(weight: torch.Tensor) -> GroupedWeight:
    """Round to 4 bits: in each group of GROUP weights, to 16 equal steps from the least to the
    greatest. Scales and minimums have 16 bits if none is too small for it."""
    groups = _filled(weight.float()).view(len(weight), -1, GROUP)
    minimum, greatest = groups.amin(dim=2), groups.amax(dim=2)
    scale = (greatest - minimum) / 15
    least = scale[scale > 0].min() if (scale > 0).any() else torch.tensor(1.0)
    if least >= _LEAST_NORMAL_HALF:
        scale, minimum = scale.half().float(), minimum.half().float()
    step = torch.where(scale == 0, 1.0, scale)[..., None]
    integers = ((groups - minimum[..., None]) / step).round_().clamp_(0, 15).flatten(1)
    integers = integers.to(torch.uint8)
    return GroupedWeight(integers[:, ::2] | integers[:, 1::2] << 4, scale, minimum, 4, GROUP)


def _filled(weight: torch.Tensor) -> torch.Tensor:
    """Fill up the last group with zeros."""
    return F.pad(weight, (0, -weight.shape[1] % GROUP))


def pack_weight(
    weight: torch.Tensor | GroupedWeight, bias: torch.Tensor | None, parts: int = 1
) -> PackedWeight:
    """Pack a weight `[out_features, in_features]`: see `pack`."""
    if bias is None:
        bias = torch.zeros(weight.shape[0])
    biases = by_panel(bias.detach().float(), parts).flatten().numpy()
    if isinstance(weight, GroupedWeight) and weight.group_size % UNIT:
        weight = weight.dense()
    if isinstance(weight, torch.Tensor):
        return FloatWeight(as_array(by_panel(weight, parts).transpose(1, 2)), biases)
    scales, minimums = _NONE, _NONE
    # 1. One scale a row, and no minimum: a factor of the whole sum, so that x may have any groups.
    if weight.scale.shape[1] == 1 and weight.minimum is None and weight.bits == 8:
        factors = weight.scale[:, 0]
        group = GROUP if weight.shape[1] % GROUP == 0 else UNIT
    # 2. A scale a group, with or without minimums.
    else:
        factors, group = torch.ones(weight.shape[0]), _group_of(weight.group_size)
        weight = weight.regrouped(group)
        scales = _panels_of_groups(weight.scale, parts)
        if weight.minimum is not None:
            is_centred = weight.bits == 4 and torch.equal(weight.minimum, -8 * weight.scale)
            minimums = _MINUS_EIGHT if is_centred else _panels_of_groups(weight.minimum, parts)
    quants = _panels_of_quants(weight, group, parts)
    by_column = by_panel(factors, parts).flatten().numpy()
    return IntegerWeight(quants, scales, minimums, by_column, biases, group)


def unpack(packed: PackedWeight, out_features: int, in_features: int) -> torch.Tensor:
    """Return the dense weight `[out_features, in_features]` of panels in one part; float32 if they
    are integers, else of the type of the panels."""
    if isinstance(packed, FloatWeight):
        panels = torch.from_numpy(packed.panels)
        if panels.dtype != torch.float32:
            panels = panels.view(torch.bfloat16 if panels.dtype == torch.uint16 else torch.float16)
        return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:out_features]
    assert isinstance(packed, IntegerWeight)
    octets = torch.from_numpy(packed.quants)
    groups = packed.num_groups
    octets = octets.reshape(len(octets), groups, -1, PANEL_COLUMNS, 1, 4)
    if octets.dtype == torch.uint8:
        integers = torch.cat((octets & 15, octets >> 4), dim=4).float()
    else:
        integers = (octets ^ -ZERO_OF_BYTES).float()
    weight = integers.permute(0, 3, 1, 2, 4, 5).reshape(-1, groups, packed.group)
    if packed.scales.dtype != np.uint8:
        scale = _groups_of_panels(packed.scales)
        weight *= scale
        if packed.minimums.dtype == np.int8:
            weight -= 8 * scale
        elif packed.minimums.dtype != np.uint8:
            weight += _groups_of_panels(packed.minimums)
    weight *= torch.from_numpy(packed.factors)[:, None, None]
    return weight.flatten(1)[:out_features, :in_features]


def by_panel(rows: torch.Tensor, parts: int) -> torch.Tensor:
    """Return rows `[out_features, …]` as `[panels, PANEL_COLUMNS, …]`: the rows of each part filled
    up to whole panels, and the panels of the parts in turns."""
    rest = rows.shape[1:]
    rows = rows.reshape(parts, -1, *rest)
    padding = [0, 0] * len(rest) + [0, -rows.shape[1] % PANEL_COLUMNS]
    rows = F.pad(rows, padding).view(parts, -1, PANEL_COLUMNS, *rest)
    return rows.transpose(0, 1).flatten(0, 1)


def _group_of(size: int) -> int:
    """Return the number of features of x that share a step, if as many weights as `size` share a
    scale: as many, if they are not too many."""
    return max(each for each in range(UNIT, MAX_GROUP + 1, UNIT) if size % each == 0)


def _panels_of_quants(weight: GroupedWeight, group: int, parts: int) -> NDArray[Any]:
    """Return the integers in the order of `IntegerProduct.quants`."""
    halves = 8 // weight.bits
    integers = weight.integers()
    columns = by_panel(integers, parts)  # [panels, PANEL_COLUMNS, in_features]
    groups = columns.shape[2] // group
    columns = columns.view(len(columns), PANEL_COLUMNS, groups, -1, halves, 4)
    columns = columns.permute(0, 2, 3, 1, 4, 5)  # [panels, groups, ., PANEL_COLUMNS, halves, 4]
    if weight.bits == 4:
        low, high = columns.to(torch.uint8).unbind(dim=4)
        return (low | high << 4).flatten(2).contiguous().numpy()
    return (columns[..., 0, :] ^ -ZERO_OF_BYTES).flatten(2).contiguous().numpy()


def _panels_of_groups(numbers: torch.Tensor, parts: int) -> NDArray[Any]:
    """Return numbers `[out_features, groups]` as `[panels, groups, PANEL_COLUMNS]`, in 16 bits if
    that loses nothing."""
    halves = numbers.half()
    exact = halves if torch.equal(halves.float(), numbers) else numbers
    return as_array(by_panel(exact, parts).transpose(1, 2))


def _groups_of_panels(panels: NDArray[Any]) -> torch.Tensor:
    """Return what `_panels_of_groups` was given, `[., groups, 1]`."""
    numbers = torch.from_numpy(panels)
    if numbers.dtype == torch.int16:
        numbers = numbers.view(torch.float16).float()
    return numbers.transpose(1, 2).flatten(0, 1)[..., None]
