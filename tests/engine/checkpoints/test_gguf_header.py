"""Test that a GGUF header that is cut, inconsistent or hostile is refused in one line, at once."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.engine.checkpoints.checkpoint import open_checkpoint
from quire.engine.checkpoints.gguf_header import read_header
from quire.engine.errors import ModelLoadError, StartupError, UnsupportedModelError

from ..worker_driver import make_config
from .gguf_files import write_model

SECONDS, MEGABYTES = 5, 64
"""What reading a broken file of a few kilobytes may take at most."""


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCHITECTURE = entry("general.architecture", 8, text("llama"))


def tensor(
    name: str = "t", dims: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0
) -> bytes:
    return (
        text(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", kind, offset)
    )


def file_of(
    entries: list[bytes],
    tensors: list[bytes],
    data: int = 256,
    *,
    start: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_entries: int | None = None,
) -> bytes:
    """Return the bytes of a file, with zeros for data and counts that may lie."""
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(entries) if num_entries is None else num_entries,
    )
    head = start + struct.pack("<IQQ", version, *counts) + b"".join(entries + tensors)
    return head + bytes(-len(head) % 32 + data)


def read(path: Path, content: bytes) -> Any:
    path.write_bytes(content)
    return read_header(path, ("tokenizer.ggml.tokens",))


def test_a_header_is_read(tmp_path: Path) -> None:
    entries = [
        ARCHITECTURE,
        entry("a", 4, struct.pack("<I", 7)),
        entry("b", 6, struct.pack("<f", 0.5)),
        entry("c", 7, b"\x01"),
        entry("d", 9, struct.pack("<IQ3h", 3, 3, -1, 2, 3)),
        entry("e", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yz")),
        entry("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("é") + text("")),
    ]
    header = read(
        tmp_path / "a.gguf", file_of(entries, [tensor(), tensor("u", (32,), 8, 256)], 320)
    )
    array = header.metadata.pop("d")
    assert isinstance(array, np.ndarray) and array.tolist() == [-1, 2, 3]
    assert header.metadata == {
        "general.architecture": "llama",
        "a": 7,
        "b": 0.5,
        "c": True,
        "e": 2,
        "tokenizer.ggml.tokens": ["é", ""],
    }
    first, second = header.tensors["t"], header.tensors["u"]
    assert (first.shape, first.num_bytes, second.shape, second.num_bytes) == (
        (2, 32),
        256,
        (32,),
        34,
    )
    assert second.offset == first.offset + 256 and first.offset % 32 == 0


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "only 0 bytes"),
    "short": (b"GGUF" + bytes(8), "only 12 bytes"),
    "magic": (file_of([ARCHITECTURE], [], start=b"PK\x03\x04"), "does not begin with GGUF"),
    "version 1": (file_of([ARCHITECTURE], [], version=1), "version 1 is not supported"),
    "version 9": (file_of([ARCHITECTURE], [], version=9), "version 9 is not supported"),
    "big-endian": (file_of([ARCHITECTURE], [], version=3 << 24), "big-endian is not supported"),
    "metadata count": (file_of([ARCHITECTURE], [], num_entries=2**60), "cannot hold"),
    "one entry too many": (
        file_of([ARCHITECTURE], [], 0, num_entries=2),
        "key is empty|cut|cannot hold",
    ),
    "tensor count": (file_of([ARCHITECTURE], [], num_tensors=2**62), "cannot hold .* tensors"),
    "no architecture": (file_of([entry("a", 7, b"\0")], []), "no general.architecture"),
    "architecture is a number": (
        file_of([entry("general.architecture", 0, b"\1")], []),
        "no general.architecture",
    ),
    "key twice": (file_of([ARCHITECTURE, ARCHITECTURE], []), "appears twice"),
    "key length": (file_of([struct.pack("<Q", 2**63)], []), "bytes long"),
    "key of half a megabyte": (file_of([text("k" * 500_000)], []), "500000 bytes long"),
    "value length": (file_of([entry("a", 8, struct.pack("<Q", 2**40))], []), "bytes long"),
    "value over the end": (file_of([entry("a", 8, struct.pack("<Q", 10**6))], []), "cut"),
    "value type": (file_of([entry("a", 99, b"")], []), "unknown type 99"),
    "array length": (file_of([entry("a", 9, struct.pack("<IQ", 0, 2**61))], []), "cannot hold"),
    "array of strings": (file_of([entry("a", 9, struct.pack("<IQ", 8, 2**61))], []), "cannot hold"),
    "array of arrays": (file_of([entry("a", 9, struct.pack("<IQ", 9, 1))], []), "unsupported type"),
    "string in an array": (
        file_of([entry("a", 9, struct.pack("<IQQ", 8, 1, 2**50))], []),
        "header is cut",
    ),
    "no UTF-8": (file_of([entry("a", 8, struct.pack("<Q", 1) + b"\xff")], []), "not UTF-8"),
    "split": (
        file_of([ARCHITECTURE, entry("split.count", 2, struct.pack("<H", 3))], []),
        "one of 3 parts",
    ),
    "alignment 0": (
        file_of([ARCHITECTURE, entry("general.alignment", 4, bytes(4))], []),
        "general.alignment is 0",
    ),
    "alignment 48": (
        file_of([ARCHITECTURE, entry("general.alignment", 4, struct.pack("<I", 48))], []),
        "not a power of two",
    ),
    "alignment 2 GiB": (
        file_of([ARCHITECTURE, entry("general.alignment", 4, struct.pack("<I", 2**31))], []),
        "general.alignment is 2147483648",
    ),
    "dimensions": (file_of([ARCHITECTURE], [tensor(dims=(1,) * 5)]), "5 dimensions"),
    "no dimension": (file_of([ARCHITECTURE], [tensor(dims=())]), "0 dimensions"),
    "empty tensor": (file_of([ARCHITECTURE], [tensor(dims=(32, 0))]), "is empty"),
    "tensor type": (file_of([ARCHITECTURE], [tensor(kind=77)]), "unknown type 77"),
    "half a block": (file_of([ARCHITECTURE], [tensor(dims=(33, 1), kind=2)]), "no multiple of 32"),
    "huge tensor": (file_of([ARCHITECTURE], [tensor(dims=(2**60, 2**60))]), "is it cut"),
    "overflow of 64 bits": (file_of([ARCHITECTURE], [tensor(dims=(2**32, 2**32))]), "is it cut"),
    "offset": (file_of([ARCHITECTURE], [tensor(offset=2**62)]), "is it cut"),
    "unaligned": (file_of([ARCHITECTURE], [tensor(offset=8)]), "not aligned to 32"),
    "tensor twice": (file_of([ARCHITECTURE], [tensor(), tensor(offset=256)], 512), "twice"),
    "overlap": (file_of([ARCHITECTURE], [tensor(), tensor("u", offset=128)], 512), "overlaps"),
    "cut data": (file_of([ARCHITECTURE], [tensor()], 255), "is it cut"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_refused(tmp_path: Path, name: str) -> None:
    content, reason = BROKEN[name]
    path = tmp_path / "broken.gguf"
    began = time.monotonic()
    tracemalloc.start()
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=reason) as caught:
        read(path, content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - began < SECONDS and peak < MEGABYTES * 2**20
    assert "\n" not in caught.value.message and str(path) in caught.value.message


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """A file to break, its bytes, and the length of its header."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_model(path, "qwen2", "Q4_0")
    header = read_header(path)
    return path, path.read_bytes(), min(tensor.offset for tensor in header.tensors.values())


def open_as_the_engine_does(path: Path) -> None:
    checkpoint = open_checkpoint(make_config(path))
    assert checkpoint is not None
    checkpoint.hf_config()


def test_every_cut_is_refused(whole: tuple[Path, bytes, int]) -> None:
    path, content, length = whole
    open_as_the_engine_does(path)
    broken = path.with_name("cut.gguf")
    for end in [*range(0, length, 97), length - 1, length, len(content) - 1]:
        broken.write_bytes(content[:end])
        with pytest.raises(StartupError):
            open_as_the_engine_does(broken)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 2**30),
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**61, 2**63, 2**64 - 1]).map(
                    lambda number: struct.pack("<Q", number)
                ),
            ),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_changed_bytes_give_an_error_or_a_header(
    whole: tuple[Path, bytes, int], changes: list[tuple[int, bytes]]
) -> None:
    path, content, length = whole
    broken = bytearray(content)
    for place, new in changes:
        place %= length
        broken[place : place + len(new)] = new
    file = path.with_name("changed.gguf")
    file.write_bytes(broken[: len(content)])
    began = time.monotonic()
    tracemalloc.start()
    try:
        open_as_the_engine_does(file)
    except StartupError as error:
        assert "\n" not in error.message
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.monotonic() - began < SECONDS and peak < MEGABYTES * 2**20
