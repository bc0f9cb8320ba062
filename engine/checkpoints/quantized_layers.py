"""The layouts of quantised linear layers in safetensors, as grouped weights or dense tensors.

A layer is a few tensors under one name. All layouts here are w = scale * (q - zero) by group, so
that nothing is rounded: minimum = -scale * zero. Packed integers are in 32-bit words, the first in
the lowest bits, unless it is said otherwise. N is out_features, K in_features, G the groups.

    AWQ (GEMM)   qweight [K, N/8], qzeros [G, N/8], scales [G, N]; a word's nibbles are the columns
                 0, 2, 4, 6, 1, 3, 5, 7 (github.com/casper-hansen/AutoAWQ)
    GPTQ         qweight [K * bits/32, N], qzeros [G, N * bits/32], scales [G, N], g_idx [K]: the
                 group of each input; version 1 stores zero - 1 (github.com/ModelCloud/GPTQModel)
    packed       weight_packed [N, K * bits/32], weight_scale [N, G], weight_zero_point
                 [N * bits/32, G], weight_shape, weight_g_idx (github.com/vllm-project/
                 compressed-tensors, pack-quantized)
    integers     weight [N, K] int8, weight_scale [N, G] or one number, weight_zero_point
    float8       weight [N, K] float8_e4m3fn, with weight_scale [N, G] or one number, or with
                 weight_scale_inv for blocks of rows and columns (DeepSeek V3, arXiv 2412.19437)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from ..body.grouped_linear import GroupedWeight
from .tensor_files import StoredTensor

Read = Callable[[str], torch.Tensor]
"""Returns a layer's tensor by the last part of its name."""
_ORDER_OF_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of a word that holds each of eight columns."""
_FLOATS = frozenset({"F16", "BF16", "F32"})
_FLOAT8_SCALES = _FLOATS | {"F8_E8M0"}


class Layout(NamedTuple):
    """How one layer is stored. `parts` are the last parts of the names of the tensors that are
    read; `read` returns W, dense if it does not fit groups, and raises ValueError on numbers that
    are no weight's."""

    name: str
    parts: tuple[str, ...]
    read: Callable[[Read], GroupedWeight | torch.Tensor]


def find_layout(
    tensors: Mapping[str, StoredTensor],
    shape: tuple[int, int],
    *,
    is_awq: bool,
    first_zero: int,
    block: tuple[int, int] | None,
) -> Layout | None:
    """Return the layout of the layer whose tensors these are, by the last parts of their names;
    None if its weight is plain. Raises ValueError if they do not fit the weight's `shape`.

    `first_zero` is what GPTQ's zeros are stored less: 1, or 0 in version 2. `block` has the rows
    and columns of a block of weight_scale_inv.
    """
    if "qweight" in tensors:
        return _awq(tensors, shape) if is_awq else _gptq(tensors, shape, first_zero)
    if "weight_packed" in tensors:
        return _packed(tensors, shape)
    kind = tensors["weight"].dtype if "weight" in tensors else ""
    if kind == "I8":
        return _integers(tensors, shape)
    if kind == "F8_E4M3":
        return _float8(tensors, shape, block)
    if kind and kind not in _FLOATS | {"F64"}:
        raise ValueError(f"weight is of type {kind}, which is not read")
    return None


# -- AWQ and GPTQ --------------------------------------------------------------------------------


def _awq(tensors: Mapping[str, StoredTensor], shape: tuple[int, int]) -> Layout:
    out_features, in_features = shape
    groups = _groups_of(tensors, "scales", 0, in_features)
    _expect(tensors, "qweight", {"I32"}, (in_features, _exact(out_features, 8)))
    _expect(tensors, "qzeros", {"I32"}, (groups, out_features // 8))
    _expect(tensors, "scales", _FLOATS, (groups, out_features))

    def nibbles(words: torch.Tensor) -> torch.Tensor:
        """`[rows, N/8]` int32 → `[N, rows]` uint8."""
        halves = words.contiguous().view(torch.uint8).view(*words.shape, 4)
        by_nibble = torch.stack((halves & 15, halves >> 4), dim=-1).flatten(2)
        return by_nibble[..., list(_ORDER_OF_AWQ)].flatten(1).T

    def read(get: Read) -> GroupedWeight:
        scale = _finite("scales", get("scales").float().T)
        zeros = nibbles(get("qzeros")).float()
        return _with_zeros(_pairs(nibbles(get("qweight"))), scale, zeros, 4)

    return Layout("AWQ", ("qweight", "qzeros", "scales"), read)


def _gptq(tensors: Mapping[str, StoredTensor], shape: tuple[int, int], first_zero: int) -> Layout:
    out_features, in_features = shape
    groups = _groups_of(tensors, "scales", 0, in_features)
    bits = _bits_of(tensors, "qweight", 0, in_features)
    _expect(tensors, "qweight", {"I32"}, (_exact(in_features, 32 // bits), out_features))
    _expect(tensors, "qzeros", {"I32"}, (groups, _exact(out_features, 32 // bits)))
    _expect(tensors, "scales", _FLOATS, (groups, out_features))
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales")
    if "g_idx" in tensors:
        _expect(tensors, "g_idx", {"I32", "I64"}, (in_features,))
        parts = (*parts, "g_idx")

    def read(get: Read) -> GroupedWeight | torch.Tensor:
        scale = _finite("scales", get("scales").float().T)
        octets = get("qweight").T.contiguous().view(torch.uint8)
        zeros = _fields(get("qzeros").contiguous().view(torch.uint8), bits).T.float() + first_zero
        index = get("g_idx").long() if "g_idx" in tensors else None
        return _ordered(octets, scale, zeros, bits, index)

    return Layout(f"GPTQ of {bits} bits", parts, read)


# -- compressed-tensors --------------------------------------------------------------------------


def _packed(tensors: Mapping[str, StoredTensor], shape: tuple[int, int]) -> Layout:
    out_features, in_features = shape
    groups = _groups_of(tensors, "weight_scale", 1, in_features)
    bits = _bits_of(tensors, "weight_packed", 1, in_features)
    _expect(tensors, "weight_packed", {"I32"}, (out_features, -(-in_features * bits // 32)))
    _expect(tensors, "weight_scale", _FLOATS, (out_features, groups))
    parts: tuple[str, ...] = ("weight_packed", "weight_scale")
    if "weight_zero_point" in tensors:
        words = -(-out_features * bits // 32)
        _expect(tensors, "weight_zero_point", {"I32"}, (words, groups))
        parts = (*parts, "weight_zero_point")
    if "weight_g_idx" in tensors:
        _expect(tensors, "weight_g_idx", {"I32", "I64"}, (in_features,))
        parts = (*parts, "weight_g_idx")
    if in_features % 2:
        raise ValueError(f"{in_features} packed columns are not even")

    def read(get: Read) -> GroupedWeight | torch.Tensor:
        scale = _finite("weight_scale", get("weight_scale").float())
        octets = get("weight_packed").contiguous().view(torch.uint8)
        octets = octets[:, : in_features * bits // 8].contiguous()
        zeros = torch.full_like(scale, 2.0 ** (bits - 1))
        if "weight_zero_point" in tensors:
            columns = get("weight_zero_point").T.contiguous().view(torch.uint8)
            zeros = _fields(columns, bits)[:, :out_features].T.float()
        index = get("weight_g_idx").long() if "weight_g_idx" in tensors else None
        if index is not None and (index < 0).all():  # as it is written without an order
            index = None
        return _ordered(octets, scale, zeros, bits, index)

    return Layout(f"packed integers of {bits} bits", parts, read)


def _integers(tensors: Mapping[str, StoredTensor], shape: tuple[int, int]) -> Layout:
    _expect(tensors, "weight", {"I8"}, shape)
    by_row = _scale_shape(tensors, "weight_scale", shape)
    parts: tuple[str, ...] = ("weight", "weight_scale")
    if "weight_zero_point" in tensors:
        _expect(tensors, "weight_zero_point", {"I8"}, tensors["weight_scale"].shape)
        parts = (*parts, "weight_zero_point")

    def read(get: Read) -> GroupedWeight:
        scale = _finite("weight_scale", get("weight_scale").float()).expand(by_row)
        zeros = None
        if "weight_zero_point" in tensors:
            zeros = get("weight_zero_point").float().expand(by_row)
        minimum = None if zeros is None or not zeros.any() else -scale * zeros
        quants, group_size = get("weight"), shape[1] // by_row[1]
        return GroupedWeight(quants, scale.contiguous(), minimum, 8, group_size)

    return Layout("integers of 8 bits", parts, read)


def _float8(
    tensors: Mapping[str, StoredTensor], shape: tuple[int, int], block: tuple[int, int] | None
) -> Layout:
    out_features, in_features = shape
    _expect(tensors, "weight", {"F8_E4M3"}, shape)
    name = "weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"
    stored = _of(tensors, name)
    if stored.dtype not in _FLOAT8_SCALES:
        raise ValueError(f"{name} is of type {stored.dtype}, which is not read")
    rows, columns, by_row = 1, in_features, (out_features, 1)
    is_blocks = block is not None and len(stored.shape) == 2 and stored.shape[1] != 1
    is_blocks |= block is not None and stored.shape == tuple(
        -(-size // part) for size, part in zip(shape, block, strict=True)
    )
    if is_blocks:
        assert block is not None
        rows, columns = block
        by_row = (-(-out_features // rows), -(-in_features // columns))
        _expect(tensors, name, _FLOAT8_SCALES, by_row)
    else:
        by_row = _scale_shape(tensors, name, shape)
        columns = in_features // by_row[1]

    parts: tuple[str, ...] = ("weight", name)
    if "weight_zero_point" in tensors:
        parts = (*parts, "weight_zero_point")

    def read(get: Read) -> GroupedWeight | torch.Tensor:
        weight = get("weight")
        if "weight_zero_point" in tensors and get("weight_zero_point").float().any():
            raise ValueError("weight_zero_point is not zero")
        if _bits_are_nan(weight):
            raise ValueError("weight has numbers that are not finite")
        scale = _finite(name, get(name).float())
        if is_blocks:
            scale = scale.repeat_interleave(rows, dim=0)[:out_features]
        scale = scale.expand(out_features, by_row[1]).contiguous()
        if in_features % columns:
            wide = scale.repeat_interleave(columns, dim=1)[:, :in_features]
            return weight.float() * wide
        return GroupedWeight(weight, scale, None, 8, columns)

    return Layout("float8", parts, read)


# -- what they share -----------------------------------------------------------------------------


def _ordered(
    octets: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    index: torch.Tensor | None,
) -> GroupedWeight | torch.Tensor:
    """Return the weight of packed rows `[N, K * bits/8]`; dense if the inputs' groups `index` are
    not one after the other ("act-order")."""
    in_features = octets.shape[1] * 8 // bits
    groups = scale.shape[1]
    if index is not None:
        if index.min() < 0 or index.max() >= groups:
            raise ValueError(f"the index of groups is not from 0 to {groups - 1}")
        if not torch.equal(index, torch.arange(in_features) // (in_features // groups)):
            integers = _fields(octets, bits).float()
            return (integers - zeros[:, index]) * scale[:, index]
    return _with_zeros(octets, scale, zeros, bits)


def _with_zeros(
    octets: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor, bits: int
) -> GroupedWeight:
    """Return the weight of packed unsigned integers; those of 8 bits become signed ones."""
    size = octets.shape[1] * 8 // bits // scale.shape[1]
    scale = scale.contiguous()
    if bits == 4:
        return GroupedWeight(octets, scale, -scale * zeros, 4, size)
    zeros = zeros - 128
    minimum = -scale * zeros if zeros.any() else None
    return GroupedWeight((octets ^ 128).view(torch.int8), scale, minimum, 8, size)


def _fields(octets: torch.Tensor, bits: int) -> torch.Tensor:
    """Return packed unsigned integers `[rows, bytes]` one in a byte."""
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def _pairs(integers: torch.Tensor) -> torch.Tensor:
    """Pack integers of 4 bits `[N, K]`, two in a byte, the first in the low half."""
    return integers[:, ::2] | integers[:, 1::2] << 4


def _finite(name: str, values: torch.Tensor) -> torch.Tensor:
    smallest, largest = values.aminmax()  # NaN if any is
    if not (smallest.isfinite() and largest.isfinite()):
        raise ValueError(f"{name} has numbers that are not finite")
    return values


def _bits_are_nan(weight: torch.Tensor) -> bool:
    return bool(((weight.view(torch.uint8) & 0x7F) == 0x7F).any())


def _of(tensors: Mapping[str, StoredTensor], name: str) -> StoredTensor:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    return tensors[name]


def _expect(
    tensors: Mapping[str, StoredTensor],
    name: str,
    dtypes: frozenset[str] | set[str],
    shape: tuple[int, ...],
) -> None:
    found = _of(tensors, name)
    if found.shape != shape:
        raise ValueError(f"{name} has the shape {found.shape}, not {shape}")
    if found.dtype not in dtypes:
        raise ValueError(f"{name} is of type {found.dtype}, not {' or '.join(sorted(dtypes))}")


def _exact(size: int, divisor: int) -> int:
    if size % divisor:
        raise ValueError(f"a side of {size} does not fill words of {divisor} integers")
    return size // divisor


def _groups_of(tensors: Mapping[str, StoredTensor], name: str, dim: int, in_features: int) -> int:
    """Return the number of groups of a row, which the scales state."""
    shape = _of(tensors, name).shape
    if len(shape) != 2:
        raise ValueError(f"{name} has the shape {shape}, not two dimensions")
    groups = shape[dim]
    if groups < 1 or in_features % groups or in_features // groups % 2:
        raise ValueError(f"{name} has {groups} groups, which do not divide {in_features} columns")
    return groups


def _bits_of(tensors: Mapping[str, StoredTensor], name: str, dim: int, in_features: int) -> int:
    """Return the number of bits of an integer, which follows from the number of words."""
    shape = _of(tensors, name).shape
    words = shape[dim] if len(shape) == 2 else 0
    for bits in (4, 8):
        if words == -(-in_features * bits // 32):
            return bits
    raise ValueError(
        f"{name} has the shape {shape}: {in_features} columns of 4 or 8 bits would be others, "
        "and no other number of bits is read"
    )


def _scale_shape(
    tensors: Mapping[str, StoredTensor], name: str, shape: tuple[int, int]
) -> tuple[int, int]:
    """Return the shape `[N, G]` that scales by tensor, by row or by group are expanded to."""
    found = _of(tensors, name)
    out_features, in_features = shape
    if found.dtype not in _FLOAT8_SCALES:
        raise ValueError(f"{name} is of type {found.dtype}, which is not read")
    if found.shape in ((), (1,), (1, 1), (out_features, 1)):
        return out_features, 1
    if len(found.shape) == 2 and found.shape[0] == out_features:
        return out_features, _groups_of(tensors, name, 1, in_features)
    raise ValueError(f"{name} has the shape {found.shape}, which does not fit {shape}")
