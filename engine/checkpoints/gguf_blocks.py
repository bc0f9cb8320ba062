"""GGML's blocks as grouped weights, exactly, or as dense tensors.

A row of a quantised tensor is a sequence of blocks, each with its scales and integers. All of
KEPT_TYPES are w = scale * q + minimum by group, so nothing is rounded here: 4-bit types keep their
4 bits, and types of 5, 6 and 8 bits become 8-bit integers. Types of 2 and 3 bits become 4 bits.
Layouts: github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..body.grouped_linear import GroupedWeight

if TYPE_CHECKING:
    from numpy.typing import NDArray


class _Groups(NamedTuple):
    """Blocks taken apart: integers `[blocks, groups, group_size]`, and for each group its scale and
    minimum `[blocks, groups]` float32."""

    integers: NDArray[Any]
    scale: NDArray[np.float32]
    minimum: NDArray[np.float32] | None
    bits: int


def type_name(kind: int) -> str:
    """Return GGML's name of a type, such as Q4_0."""
    from gguf import GGMLQuantizationType

    return str(GGMLQuantizationType(kind).name)


def keep_blocks(kind: int, rows: NDArray[np.uint8]) -> GroupedWeight:
    """Return the weight of blocks `[out_features, bytes]`; `kind` is one of KEPT_TYPES."""
    block_bytes, take_apart = _KEPT[type_name(kind)]
    num_rows = len(rows)
    parts = take_apart(np.ascontiguousarray(rows).reshape(-1, block_bytes))
    group_size = parts.integers.shape[-1]
    if parts.bits == 4:
        pairs = parts.integers.reshape(-1, 2)
        quants = (pairs[:, 0] | pairs[:, 1] << 4).reshape(num_rows, -1)
    else:
        quants = parts.integers.reshape(num_rows, -1)

    def by_row(values: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32, copy=False).reshape(num_rows, -1))

    return GroupedWeight(
        torch.from_numpy(quants),
        by_row(parts.scale),
        None if parts.minimum is None else by_row(parts.minimum),
        parts.bits,
        group_size,
    )


def make_dense(kind: int, rows: NDArray[np.uint8], shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor of rows of bytes: of its own float type, or float32 if it is quantised."""
    name = type_name(kind)
    if name in _FLOATS:
        return torch.from_numpy(np.array(rows)).view(_FLOATS[name]).view(shape)
    from gguf import GGMLQuantizationType, dequantize

    with warnings.catch_warnings(), np.errstate(all="ignore"):  # scales may overflow: see callers
        warnings.simplefilter("ignore")
        values = dequantize(np.ascontiguousarray(rows), GGMLQuantizationType(kind))
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(shape)


def _halves(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Read float16 numbers `[blocks, 2 n]` bytes as float32 `[blocks, n]`."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _nibbles(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`[blocks, n, m]` bytes → their low halves, then their high ones: `[blocks, n, 2 m]`."""
    return np.concatenate((data & 15, data >> 4), axis=-1)


def _q4_0(data: NDArray[np.uint8]) -> _Groups:
    scale = _halves(data[:, :2])
    return _Groups(_nibbles(data[:, None, 2:]), scale, -8 * scale, 4)


def _q4_1(data: NDArray[np.uint8]) -> _Groups:
    return _Groups(_nibbles(data[:, None, 4:]), _halves(data[:, :2]), _halves(data[:, 2:4]), 4)


def _fifth_bits(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Four bytes a block hold the fifth bits of its 32 integers: `[blocks, 1, 32]` of 0 or 16."""
    bits: NDArray[np.uint8] = np.unpackbits(data, axis=1, bitorder="little")[:, None] * np.uint8(16)
    return bits


def _q5_0(data: NDArray[np.uint8]) -> _Groups:
    integers = _nibbles(data[:, None, 6:]) | _fifth_bits(data[:, 2:6])
    return _Groups(integers.astype(np.int8) - np.int8(16), _halves(data[:, :2]), None, 8)


def _q5_1(data: NDArray[np.uint8]) -> _Groups:
    integers = _nibbles(data[:, None, 8:]) | _fifth_bits(data[:, 4:8])
    return _Groups(integers.astype(np.int8), _halves(data[:, :2]), _halves(data[:, 2:4]), 8)


def _q8_0(data: NDArray[np.uint8]) -> _Groups:
    return _Groups(data[:, None, 2:].view(np.int8), _halves(data[:, :2]), None, 8)


def _six_bits(data: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return scale and minimum of the eight groups of a Q4_K or Q5_K block, `[blocks, 8]`, from its
    first 16 bytes: two float16 numbers, by which eight pairs of 6 bits are multiplied."""
    low, middle, high = (data[:, start : start + 4] for start in (4, 8, 12))
    scale = np.concatenate((low & 63, (high & 15) | (low >> 6 << 4)), axis=1)
    minimum = np.concatenate((middle & 63, (high >> 4) | (middle >> 6 << 4)), axis=1)
    return (
        _halves(data[:, :2]) * scale.astype(np.float32),
        _halves(data[:, 2:4]) * -minimum.astype(np.float32),
    )


def _q4_k(data: NDArray[np.uint8]) -> _Groups:
    integers = _nibbles(data[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _Groups(integers, *_six_bits(data), 4)


def _q5_k(data: NDArray[np.uint8]) -> _Groups:
    integers = _nibbles(data[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    integers |= (data[:, None, 16:48] >> shifts & 1) << 4
    return _Groups(integers.astype(np.int8), *_six_bits(data), 8)


def _q6_k(data: NDArray[np.uint8]) -> _Groups:
    # Each half of a block has 64 bytes of low nibbles and 32 of high bits, for 128 integers.
    low = _nibbles(data[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = data[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    integers = ((high << 4) | low).astype(np.int8) - np.int8(32)
    scale = _halves(data[:, 208:]) * data[:, 192:208].view(np.int8).astype(np.float32)
    return _Groups(integers.reshape(-1, 16, 16), scale, None, 8)


def _two_bits(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """64 bytes a block hold 256 integers of 2 bits: `[blocks, 2, 4, 32]`."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    integers: NDArray[np.uint8] = (data.reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)
    return integers


def _q2_k(data: NDArray[np.uint8]) -> _Groups:
    scale = _halves(data[:, 80:82]) * (data[:, :16] & 15).astype(np.float32)
    minimum = _halves(data[:, 82:84]) * -(data[:, :16] >> 4).astype(np.float32)
    return _Groups(_two_bits(data[:, 16:80]).reshape(-1, 16, 16), scale, minimum, 4)


def _q3_k(data: NDArray[np.uint8]) -> _Groups:
    # 1. Integers: two bits, and a third one in the mask. Of them 4 is subtracted; stored 4 greater,
    #    they have the minimum of Q4_0, which takes no memory.
    bits = np.arange(8, dtype=np.uint8).reshape(2, 4, 1)
    third = data[:, None, None, :32] >> bits & 1
    integers = (third << 2 | _two_bits(data[:, 32:96])).reshape(-1, 16, 16) + np.uint8(4)
    # 2. Scales: four bits in eight bytes, and two more in four bytes; 32 is subtracted.
    low = _nibbles(data[:, None, 96:104])[:, 0]
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (data[:, None, 104:108] >> shifts & 3).reshape(-1, 16)
    scale = _halves(data[:, 108:]) * ((high << 4 | low).astype(np.float32) - 32)
    return _Groups(integers, scale, -8 * scale, 4)


_KEPT: dict[str, tuple[int, Callable[[NDArray[np.uint8]], _Groups]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q2_K": (84, _q2_k),
    "Q3_K": (110, _q3_k),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
"""For each kept type the bytes of a block, and the function that takes blocks apart."""
KEPT_TYPES = frozenset(_KEPT)
"""Names of the types whose blocks are kept."""
_FLOATS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
