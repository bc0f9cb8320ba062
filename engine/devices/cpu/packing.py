"""The weights of linear layers as panels: floats, or integers of 4 and 8 bits.

Importing this loads Numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

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
from .memory import in_large_pages

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUP = 32
"""Features of a group: of weights of 4 bits, and of x for weights with a scale a column."""
MAX_GROUP = 256
"""Maximum features of x that share a step."""
UNIT_FEATURES = 256
"""Features that share a unit of scales and one of minimums, unless all of a row's do."""
_MOST_STEPS = 127
_SAMPLE_ROWS = 64
_NOTHING: NDArray[Any] = np.zeros(0, np.uint8)
_MINUS_EIGHT: NDArray[Any] = np.zeros(0, np.uint16)
"""For kinds of scales and minimums: none, and -8 times the scale. See `IntegerProduct`."""


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
        linear.grouped = emptied(linear.grouped)
        return packed
    weight, bias = linear.weight.detach(), linear.bias
    packed = pack_weight(rounded(weight, quantization), bias, parts)
    linear.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return packed


def emptied(weight: GroupedWeight) -> GroupedWeight:
    """Return what stands in for a weight that has been packed."""
    none = torch.empty(0, 1)
    return weight._replace(quants=none, scale=none, minimum=None)


def packed_bytes(weight: torch.Tensor | GroupedWeight, quantization: str | None) -> int:
    """Return the bytes that a weight `[out_features, in_features]` takes packed, without its bias
    and the columns that fill its last panel, if its other rows are like the first ones."""
    rows, columns = weight.shape
    few: torch.Tensor | GroupedWeight = (
        rounded(weight[:_SAMPLE_ROWS].detach(), quantization)
        if isinstance(weight, torch.Tensor)
        else weight.rows(slice(_SAMPLE_ROWS))
    )
    if isinstance(few, torch.Tensor):
        return weight.nbytes if isinstance(weight, torch.Tensor) else 4 * rows * columns
    if few.group_size % UNIT:
        return 4 * rows * columns
    a_row = few.shape[1] * few.bits // 8
    if _has_one_scale(few):
        return rows * (a_row + 4)
    parts = columns_of_groups(few.regrouped(_group_of(few.group_size)))
    numbers = parts.numbers if parts.units is None else [*parts.numbers, parts.units.flatten(1)]
    return rows * (a_row + sum(each.shape[1] * each.element_size() for each in numbers))


def _has_one_scale(weight: GroupedWeight) -> bool:
    """Whether a row's only scale can be a factor of its sums."""
    return weight.scale.shape[1] == 1 and weight.minimum is None and weight.bits == 8


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
    greatest. A row's scales are integers of 8 bits times a unit of 16, and so are its minimums,
    unless 16 bits for each one make the squared error a tenth smaller: for a weight that was of 4
    bits before they may find it again."""
    groups = _filled(weight.float()).view(len(weight), -1, GROUP)
    sample = groups[:: -(-len(groups) // _SAMPLE_ROWS)]
    errors = [
        (rounded.dense().view(sample.shape) - sample).square().sum()
        for rounded in (_round_by_unit(sample), _round_by_group(sample))
    ]
    return _round_by_unit(groups) if errors[0] <= 1.1 * errors[1] else _round_by_group(groups)


def _round_by_unit(groups: torch.Tensor) -> GroupedWeight:
    """Round groups `[rows, groups, GROUP]`, with units. Minimums are rounded down and scales up, so
    that a group's steps cover it."""
    minimum, greatest = groups.amin(dim=2), groups.amax(dim=2)
    unit = _unit_of(minimum.abs())
    minimum = (minimum / unit).floor_().clamp_(min=-_MOST_STEPS) * unit
    scale = (greatest - minimum) / 15
    unit = _unit_of(scale)
    scale = (scale / unit - 1e-3).ceil_().clamp_(0, _MOST_STEPS) * unit
    return _round_groups(groups, scale, minimum)


def _round_by_group(groups: torch.Tensor) -> GroupedWeight:
    """Round groups `[rows, groups, GROUP]`. Scales and minimums have 16 bits if none is too small
    for it."""
    minimum, greatest = groups.amin(dim=2), groups.amax(dim=2)
    scale = (greatest - minimum) / 15
    if not (scale > 0).any() or scale[scale > 0].min() >= torch.finfo(torch.half).tiny:
        scale, minimum = scale.half().float(), minimum.half().float()
    return _round_groups(groups, scale, minimum)


def _unit_of(numbers: torch.Tensor) -> torch.Tensor:
    """Return a unit for each row `[rows, 1]` of which numbers `[rows, groups]` are at most
    _MOST_STEPS: rounded up to 11 bits, so that all multiples are exact, and the unit is a float16
    if it is in its range."""
    exact = numbers.amax(dim=1, keepdim=True) / _MOST_STEPS
    rounded = (exact.view(torch.int32) + 0x1FFF & ~0x1FFF).view(torch.float32)
    return torch.where(rounded == 0, 1.0, rounded)


def _round_groups(
    groups: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
) -> GroupedWeight:
    """Round groups `[rows, groups, GROUP]` to the nearest steps."""
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
        return FloatWeight(in_large_pages(by_panel(weight, parts).transpose(1, 2)), biases)
    # 1. One scale a row, and no minimum: a factor of the whole sum, so that x may have any groups.
    scales, minimums, units = _NOTHING, _NOTHING, np.zeros((0, 0, 0), np.float32)
    heads: list[torch.Tensor] = []
    if _has_one_scale(weight):
        factors = weight.scale[:, 0]
        group = GROUP if weight.shape[1] % GROUP == 0 else UNIT
        unit_groups = weight.shape[1] // group
    # 2. A scale a group, with or without minimums.
    else:
        factors, group = torch.ones(weight.shape[0]), _group_of(weight.group_size)
        weight = weight.regrouped(group)
        columns = columns_of_groups(weight)
        scales, minimums, unit_groups = columns.scales, columns.minimums, columns.unit_groups
        heads = [by_panel(each, parts).transpose(1, 2) for each in columns.numbers]
        if columns.units is not None:
            units = as_array(by_panel(columns.units, parts).permute(0, 2, 3, 1).flatten(2))
    # 3. The records: scales and minimums of a group's columns, then its quants.
    quants = _panels_of_quants(weight, group, parts)
    octets = torch.cat([each.contiguous().view(torch.uint8) for each in (*heads, quants)], dim=2)
    data = in_large_pages(octets.view(quants.dtype))
    by_column = by_panel(factors, parts).flatten().numpy()
    return IntegerWeight(data, scales, minimums, units, by_column, biases, group, unit_groups)


class GroupColumns(NamedTuple):
    """Scales and minimums as records hold them: see `IntegerProduct`."""

    numbers: list[torch.Tensor]
    """Those that records hold, each `[out_features, groups]`: int8, float16 or float32."""
    scales: NDArray[Any]
    minimums: NDArray[Any]
    units: torch.Tensor | None
    """`[out_features, ., 2]`: float16 or float32."""
    unit_groups: int


def columns_of_groups(weight: GroupedWeight) -> GroupColumns:
    """Return scales and minimums in the fewest bytes that lose nothing."""
    scale, minimum = weight.scale, weight.minimum
    groups = scale.shape[1]
    is_centred = minimum is not None and weight.bits == 4 and torch.equal(minimum, -8 * scale)
    given = [scale] if minimum is None or is_centred else [scale, minimum]
    for unit_groups in (groups, UNIT_FEATURES // weight.group_size):
        found = [_steps_of(each, unit_groups) for each in given]
        pairs = [pair for pair in found if pair is not None]
        if len(pairs) == len(given):
            units = torch.stack([pair[1] for pair in (*pairs, pairs[0])][:2], dim=2)
            numbers, units = [pair[0] for pair in pairs], _shortest(units)
            break
    else:
        numbers, units, unit_groups = [_shortest(each) for each in given], None, groups
    kinds = [as_array(each[:0, 0]) for each in numbers]
    kinds += [_MINUS_EIGHT if is_centred else _NOTHING]  # if there are no minimums
    return GroupColumns(numbers, kinds[0], kinds[1], units, unit_groups)


def _steps_of(numbers: torch.Tensor, unit_groups: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return integers of 8 bits `[rows, groups]` and units `[rows, .]`, one for each `unit_groups`,
    whose products are exactly these numbers; None if there are none, or if it saves nothing."""
    rows, groups = numbers.shape
    if not 4 <= unit_groups <= groups:
        return None
    blocks = F.pad(numbers, (0, -groups % unit_groups)).view(-1, unit_groups)
    greatest = blocks.abs().amax(dim=1)
    # The greatest of a block is so many units: mostly as many as its format has, so that few blocks
    # are left for the others. A weight of another format is found out by a sample.
    units, left = torch.zeros_like(greatest), greatest.nonzero()[:, 0]
    for part in (left[:64], left):
        for most in (_MOST_STEPS, 128, 63, *range(126, 0, -1)):
            unit, block = greatest[part, None] / most, blocks[part]
            is_exact = ((block / unit).round_() * unit == block).all(dim=1)
            units[part[is_exact]] = unit[is_exact, 0]
            part = part[~is_exact]
            if not len(part):
                break
        if len(part):
            return None
    steps = (blocks / torch.where(units == 0, 1.0, units)[:, None]).round_()
    # A byte holds -128, but not 128: then the unit is negative.
    is_too_great = steps.amax(dim=1) > _MOST_STEPS
    steps[is_too_great], units[is_too_great] = -steps[is_too_great], -units[is_too_great]
    if steps.max() > _MOST_STEPS:
        return None
    return steps.to(torch.int8).view(rows, -1)[:, :groups], units.view(rows, -1)


def _shortest(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers in 16 bits if that loses nothing."""
    halves = numbers.half()
    return halves if torch.equal(halves.float(), numbers) else numbers


def unpack(packed: PackedWeight, out_features: int, in_features: int) -> torch.Tensor:
    """Return the dense weight `[out_features, in_features]` of panels in one part; float32 if they
    are integers, else of the type of the panels."""
    if isinstance(packed, FloatWeight):
        panels = torch.from_numpy(packed.panels)
        if panels.dtype != torch.float32:
            panels = panels.view(torch.bfloat16 if panels.dtype == torch.uint16 else torch.float16)
        return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:out_features]
    assert isinstance(packed, IntegerWeight)
    data, group = torch.from_numpy(packed.data), packed.group
    is_nibbles = data.dtype == torch.uint8
    octets = data[..., data.shape[2] - group * PANEL_COLUMNS // (2 if is_nibbles else 1) :]
    octets = octets.reshape(*data.shape[:2], -1, PANEL_COLUMNS, 1, 4)
    if is_nibbles:
        integers = torch.cat((octets & 15, octets >> 4), dim=4).float()
    else:
        integers = (octets ^ -ZERO_OF_BYTES).float()
    weight = integers.permute(0, 3, 1, 2, 4, 5).reshape(-1, data.shape[1], group)
    scale, width = _columns_of_panels(packed, packed.scales, 0, 0)
    if scale is not None:
        weight *= scale
        if packed.minimums.dtype == _MINUS_EIGHT.dtype:
            weight -= 8 * scale
    minimum, _ = _columns_of_panels(packed, packed.minimums, width, 1)
    if minimum is not None:
        weight += minimum
    weight *= torch.from_numpy(packed.factors)[:, None, None]
    return weight.flatten(1)[:out_features, :in_features]


def _columns_of_panels(
    packed: IntegerWeight, kind: NDArray[Any], begin: int, which: int
) -> tuple[torch.Tensor | None, int]:
    """Return the scales (0) or minimums (1) `[., groups, 1]` that begin at a byte of the records,
    and how many bytes of a record they take."""
    if kind.dtype in (_NOTHING.dtype, _MINUS_EIGHT.dtype):
        return None, 0
    width = kind.itemsize * PANEL_COLUMNS
    octets = np.ascontiguousarray(packed.data[..., begin : begin + width])
    numbers = _floats(octets.view(kind.dtype)).transpose(1, 2)
    if kind.dtype == np.int8:
        units = _floats(packed.units)[..., which * PANEL_COLUMNS : (which + 1) * PANEL_COLUMNS]
        units = units.transpose(1, 2).repeat_interleave(packed.unit_groups, dim=2)
        numbers = numbers * units[..., : numbers.shape[2]]
    return numbers.flatten(0, 1)[..., None], width


def _floats(numbers: NDArray[Any]) -> torch.Tensor:
    """Return numbers of a record, or units, as float32."""
    tensor = torch.from_numpy(numbers)
    return tensor.view(torch.float16).float() if tensor.dtype == torch.int16 else tensor.float()


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


def _panels_of_quants(weight: GroupedWeight, group: int, parts: int) -> torch.Tensor:
    """Return the integers in the order of records, `[panels, groups, bytes]`."""
    halves = 8 // weight.bits
    integers = weight.integers()
    columns = by_panel(integers, parts)  # [panels, PANEL_COLUMNS, in_features]
    groups = columns.shape[2] // group
    columns = columns.view(len(columns), PANEL_COLUMNS, groups, -1, halves, 4)
    columns = columns.permute(0, 2, 3, 1, 4, 5)  # [panels, groups, ., PANEL_COLUMNS, halves, 4]
    if weight.bits == 4:
        low, high = columns.to(torch.uint8).unbind(dim=4)
        return (low | high << 4).flatten(2)
    return (columns[..., 0, :] ^ -ZERO_OF_BYTES).flatten(2)
