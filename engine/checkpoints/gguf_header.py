"""Reads the header of a GGUF file: its metadata and its table of tensors.

    magic "GGUF", version, number of tensors, number of metadata entries
    metadata: key, type, value (a scalar, a string, or an array of those)
    tensors:  name, dimensions (the fastest-moving first), type, offset within the data
    data:     begins at the next multiple of general.alignment

Every number in a file may be a lie. So each count and length is compared with the bytes that are
left before anything is made of it, and each tensor must lie within the file, aligned, and without
overlapping another. Whoever reads tensors after that needs no checks of its own. Only
little-endian files of versions 2 and 3 are read, and no file that is one of several parts.
Source: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Container
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from ..errors import ModelLoadError, UnsupportedModelError
from .source import require_gguf

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_HEADER_BYTES = 64 * 2**20
"""Maximum size of the metadata and the table of tensors; those of real files take up to 20 MB."""
MAX_TENSORS = 2**17
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 65535

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""Types of metadata with a fixed size, and how struct reads them."""
_STRING, _ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """A tensor in the file. `shape` is in torch's order, `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    num_bytes: int


class Header(NamedTuple):
    """What a GGUF file says of itself. In `metadata`, arrays of numbers are NumPy arrays, and
    arrays of strings are lists if they were asked for, or else the number of their elements."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """The family, under llama.cpp's name."""
        return str(self.metadata["general.architecture"])

    def number(self, key: str, default: int | None = None) -> int:
        """Return a whole number of the architecture's metadata, such as "block_count". Raises
        ModelLoadError if it is missing, negative or something else."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            self.refuse(f"{self.architecture}.{key} is {_shown(value)}, not a whole number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """Return a positive number of the architecture's metadata. Raises ModelLoadError."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            self.refuse(f"{self.architecture}.{key} is {_shown(value)}, not a positive number")
        return float(value)

    def refuse(self, reason: str) -> NoReturn:
        """Raise ModelLoadError with the file's path and the reason."""
        raise ModelLoadError(f"cannot read {self.path}: {reason}")


def _shown(value: Any) -> str:
    return "missing" if value is None else ascii(value)[:40]


def read_header(path: Path, strings: Container[str] = ()) -> Header:
    """Read and check the header of a GGUF file; `strings` are the keys of arrays of strings to
    keep.

    Raises ModelLoadError if the file is cut or not consistent, UnsupportedModelError if it is of a
    kind that is not supported, or if the package gguf is missing.
    """
    require_gguf()
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise ModelLoadError(f"cannot read {path}: it has only {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data, strings).header()
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from error


class _Parser:
    """Walks a header from the front; `_at` is the position of the next byte."""

    def __init__(self, path: Path, data: mmap.mmap, strings: Container[str]) -> None:
        self._path, self._data, self._strings = path, data, strings
        self._at = 0
        self._end = min(len(data), MAX_HEADER_BYTES)

    def header(self) -> Header:
        # 1. The fixed part.
        if self._take(4) != b"GGUF":
            self._fail("it does not begin with GGUF")
        version = self._scalar("<I")
        if version not in (2, 3):
            kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise UnsupportedModelError(
                f"{self._path}: GGUF of {kind} is not supported, only versions 2 and 3"
            )
        num_tensors, num_entries = self._scalar("<Q"), self._scalar("<Q")
        # 2. Metadata. An entry takes 13 bytes or more.
        self._check_count(num_entries, 13, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string("a key")
            if not key:
                self._fail("a key is empty")
            if key in metadata:
                self._fail(f"the key {ascii(key[:80])} appears twice")
            metadata[key] = self._value(key, self._scalar("<I"))
        if not isinstance(metadata.get("general.architecture"), str):
            self._fail("it has no general.architecture")
        if (parts := metadata.get("split.count", 1)) != 1:
            raise UnsupportedModelError(
                f"{self._path} is one of {parts} parts; join them first, by llama.cpp's "
                "llama-gguf-split --merge"
            )
        # 3. Tensors. An entry takes 33 bytes or more, and a name only as many as its length says.
        self._check_count(num_tensors, 33, "tensors")
        if num_tensors > MAX_TENSORS:
            self._fail(f"it lists {num_tensors} tensors, over the {MAX_TENSORS} that are read")
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        tensors = self._placed(entries, metadata.get("general.alignment", 32))
        return Header(self._path, metadata, tensors)

    def _placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: Any
    ) -> dict[str, TensorInfo]:
        """Check where each tensor lies, and return them by name."""
        from gguf import GGML_QUANT_SIZES

        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            self._fail(f"general.alignment is {ascii(alignment)[:40]}")
        if alignment & (alignment - 1):
            self._fail(f"general.alignment {alignment} is not a power of two")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            shown = ascii(name[:80])
            if name in tensors:
                self._fail(f"the tensor {shown} appears twice")
            if kind not in GGML_QUANT_SIZES:
                self._fail(f"the tensor {shown} has the unknown type {kind}")
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                self._fail(f"rows of the tensor {shown} are no multiple of {block} long")
            num_bytes = prod(shape) // block * block_bytes
            if offset % alignment:
                self._fail(f"the tensor {shown} is not aligned to {alignment} bytes")
            if start + offset + num_bytes > len(self._data):
                self._fail(
                    f"the tensor {shown} ends at byte {start + offset + num_bytes}, but the file "
                    f"has {len(self._data)} (is it cut?)"
                )
            tensors[name] = TensorInfo(name, shape, int(kind), start + offset, num_bytes)
        end = 0
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                self._fail(f"the tensor {ascii(tensor.name[:80])} overlaps another")
            end = tensor.offset + tensor.num_bytes
        return tensors

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("a tensor's name")
        num_dims = self._scalar("<I")
        if not 1 <= num_dims <= MAX_DIMENSIONS:
            self._fail(f"the tensor {ascii(name[:80])} has {num_dims} dimensions")
        dims = struct.unpack(f"<{num_dims}Q", self._take(8 * num_dims))
        if 0 in dims:
            self._fail(f"the tensor {ascii(name[:80])} is empty")
        kind, offset = self._scalar("<I"), self._scalar("<Q")
        return name, tuple(reversed(dims)), kind, offset

    def _value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string(key, MAX_HEADER_BYTES)
        if kind != _ARRAY:
            self._fail(f"{ascii(key[:80])} has the unknown type {kind}")
        element, count = self._scalar("<I"), self._scalar("<Q")
        if element in _SCALARS:
            layout = np.dtype(_SCALARS[element])
            self._check_count(count, layout.itemsize, f"elements of {ascii(key[:80])}")
            numbers: NDArray[Any] = np.frombuffer(self._take(count * layout.itemsize), layout)
            return numbers
        if element != _STRING:
            self._fail(f"{ascii(key[:80])} is an array of the unsupported type {element}")
        self._check_count(count, 8, f"elements of {ascii(key[:80])}")
        if key in self._strings:
            return [self._string(key) for _ in range(count)]
        for _ in range(count):
            self._skip(self._scalar("<Q"))
        return count

    def _string(self, what: str, longest: int = MAX_NAME_BYTES) -> str:
        length = self._scalar("<Q")
        if length > longest:
            self._fail(f"the text of {ascii(what[:80])} is {length} bytes long")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"the text of {ascii(what[:80])} is not UTF-8")

    def _scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _take(self, count: int) -> bytes:
        begin = self._at
        self._skip(count)
        return self._data[begin : self._at]

    def _skip(self, count: int) -> None:
        if count > self._end - self._at:
            self._fail("its header is cut, or longer than it may be")
        self._at += count

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count > (self._end - self._at) // least_bytes:
            self._fail(f"it cannot hold {count} {what}")

    def _fail(self, reason: str) -> NoReturn:
        raise ModelLoadError(f"cannot read {self._path}: {reason}")
