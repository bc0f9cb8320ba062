"""Test the stores of KV blocks by the contract that any connector has, and records that prove what
they are."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.engine.errors import ConfigurationError
from quire.engine.tiers.block_store import BlockStore
from quire.engine.tiers.disk_store import DiskStore
from quire.engine.tiers.host_store import HostStore
from quire.engine.tiers.sealed_block import HEADER_BYTES, seal, unseal

SIZE = 100
ROOM = 4


def hash_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def record(number: int, version: int = 0) -> memoryview:
    return memoryview(random.Random(number * 1000 + version).randbytes(SIZE))


def loaded(store: BlockStore, number: int) -> bytes | None:
    into = memoryview(bytearray(SIZE))
    return bytes(into) if store.load(hash_of(number), into) else None


def host_store(folder: Path) -> BlockStore:
    return HostStore(memoryview(bytearray(ROOM * SIZE)), SIZE)


def disk_store(folder: Path) -> DiskStore:
    return DiskStore(folder, ROOM * SIZE + SIZE // 2, SIZE)


@pytest.fixture(params=[host_store, disk_store])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlockStore:
    make: Callable[[Path], BlockStore] = request.param
    return make(tmp_path)


# -- the contract ----------------------------------------------------------------------------


def test_a_store_returns_what_it_was_given(store: BlockStore) -> None:
    assert store.store(hash_of(1), record(1)) == []
    assert store.contains([hash_of(0), hash_of(1)]) == [False, True]
    assert loaded(store, 1) == record(1)
    assert loaded(store, 0) is None
    store.store(hash_of(1), record(1, version=2))
    assert loaded(store, 1) == record(1, version=2)


def test_a_full_store_gives_up_the_least_recently_used_and_says_so(store: BlockStore) -> None:
    for number in range(ROOM):
        assert store.store(hash_of(number), record(number)) == []
    assert loaded(store, 0) == record(0)
    assert store.store(hash_of(9), record(9)) == [hash_of(1)]
    assert store.contains([hash_of(n) for n in (0, 1, 2, 3, 9)]) == [True, False, True, True, True]
    assert loaded(store, 1) is None


def test_an_empty_record_forgets(store: BlockStore) -> None:
    store.store(hash_of(1), record(1))
    assert store.store(hash_of(1), memoryview(b"")) == []
    assert store.store(hash_of(2), memoryview(b"")) == []
    assert store.contains([hash_of(1), hash_of(2)]) == [False, False]
    assert loaded(store, 1) is None


def test_a_record_of_another_size_is_not_found(store: BlockStore) -> None:
    store.store(hash_of(1), record(1))
    assert not store.load(hash_of(1), memoryview(bytearray(SIZE + 1)))


# -- disk ------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")


def test_a_folder_is_used_again_in_the_order_of_its_last_use(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    for number in range(ROOM):
        store.store(hash_of(number), record(number))
        os.utime(files(tmp_path)[number], ns=(number, number))
    assert loaded(store, 0) == record(0)
    store.close()
    again = disk_store(tmp_path)
    assert len(again) == ROOM
    assert loaded(again, 2) == record(2)
    assert again.store(hash_of(9), record(9)) == [hash_of(1)]
    assert len(files(tmp_path)) == ROOM


def test_a_smaller_size_after_a_restart_deletes_the_oldest(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    for number in range(ROOM):
        store.store(hash_of(number), record(number))
        os.utime(files(tmp_path)[number], ns=(number, number))
    store.close()
    smaller = DiskStore(tmp_path, 2 * SIZE, SIZE)
    assert [loaded(smaller, number) is not None for number in range(ROOM)] == [False] * 2 + [
        True
    ] * 2
    assert len(files(tmp_path)) == 2


def test_half_written_files_and_those_of_other_sizes_are_deleted(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    for number in range(3):
        store.store(hash_of(number), record(number))
    store.close()
    first, second, _ = files(tmp_path)
    first.write_bytes(b"short")
    second.with_suffix(".partial").write_bytes(record(7))
    (second.parent / "notes.txt").write_text("not ours")
    again = disk_store(tmp_path)
    assert [loaded(again, number) is not None for number in range(3)] == [False, True, True]
    assert len(files(tmp_path)) == 3
    assert (second.parent / "notes.txt").exists()


def test_a_file_that_was_cut_or_has_gone_is_a_miss(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    for number in range(3):
        store.store(hash_of(number), record(number))
    cut, long, gone = files(tmp_path)
    cut.write_bytes(record(0)[:-1])
    long.write_bytes(bytes(record(1)) + b"x")
    gone.unlink()
    assert [loaded(store, number) for number in range(3)] == [None] * 3
    assert store.contains([hash_of(number) for number in range(3)]) == [False] * 3
    assert files(tmp_path) == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk_store(tmp_path)
    store.store(hash_of(1), record(1))

    def full(file: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for number in (1, 2):
        with pytest.raises(OSError, match="No space"):
            store.store(hash_of(number), record(number, version=1))
        assert store.contains([hash_of(number)]) == [False]
    assert files(tmp_path) == []


def test_two_engines_take_parts_of_their_own(tmp_path: Path) -> None:
    first, second = disk_store(tmp_path), disk_store(tmp_path)
    assert first.folder != second.folder
    first.store(hash_of(1), record(1))
    assert second.contains([hash_of(1)]) == [False]
    first.close()
    third = disk_store(tmp_path)
    assert third.folder == first.folder and loaded(third, 1) == record(1)


def test_a_folder_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="--kv-offloading-disk: "):
        disk_store(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="--kv-offloading-disk-size is 99 bytes"):
        DiskStore(tmp_path, 99, SIZE)


# -- host memory -----------------------------------------------------------------------------


def test_a_slot_gets_new_content_only_after_the_step_that_uses_it() -> None:
    store = HostStore(memoryview(bytearray(2 * SIZE)), SIZE)
    for number, step in ((1, 5), (2, 6)):
        reserved = store.reserve()
        assert reserved is not None
        store.put(hash_of(number), reserved[0], step)
    store.ended = 4
    assert store.reserve() is None and store.hold(hash_of(1)) is None
    store.ended = 5
    held = store.hold(hash_of(1))
    assert held is not None
    assert store.reserve() is None  # one is held, the other in use
    store.let_go(held)
    assert store.reserve() == (held, hash_of(1))
    store.give_back(held)
    store.discard(hash_of(2))
    store.check_integrity()
    assert store.reserve() == (held, None)
    assert store.reserve() is None  # the slot that became free is in use by step 6
    store.ended = 6
    assert store.reserve() is not None


# -- records ---------------------------------------------------------------------------------

MODEL, OTHER_MODEL = b"m" * 32, b"n" * 32


def sealed(content: bytes, model: bytes = MODEL, own_hash: bytes = hash_of(1)) -> bytearray:
    made = bytearray(HEADER_BYTES + len(content))
    seal(model, own_hash, memoryview(content), memoryview(made))
    return made


def test_a_record_is_recognised() -> None:
    content = unseal(MODEL, hash_of(1), memoryview(sealed(b"some K and V")))
    assert content is not None and bytes(content) == b"some K and V"


@pytest.mark.parametrize(
    "foreign",
    [
        sealed(b"some K and V", model=OTHER_MODEL),
        sealed(b"some K and V", own_hash=hash_of(2)),
        sealed(b"some K and V!")[:-1],
        bytearray(HEADER_BYTES + 12),
    ],
    ids=["another model", "another hash", "cut", "zeros"],
)
def test_a_foreign_record_is_not_used(foreign: bytearray) -> None:
    assert unseal(MODEL, hash_of(1), memoryview(foreign)) is None


@given(position=st.integers(0, HEADER_BYTES + 11), change=st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(position: int, change: int) -> None:
    damaged = sealed(b"some K and V")
    damaged[position] ^= change
    assert unseal(MODEL, hash_of(1), memoryview(damaged)) is None
