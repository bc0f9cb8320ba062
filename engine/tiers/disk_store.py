"""Blocks as files of one folder, of bounded size in total, which outlive the process."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections import OrderedDict, abc
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigurationError, one_line

SUFFIX = ".kv"
PARTIAL = ".partial"
HASH_DIGITS = (64, 66)
MAX_ENGINES = 64
"""Engines that may share a folder: each has a part of its own."""

logger = logging.getLogger("quire.engine")


class DiskStore:
    """Implements BlockStore. A record is one file, named by its hash in hexadecimal digits.

    Files appear whole or not at all: each is written under another name first. What a sudden end
    left half written is removed at the next start; files that were damaged since are recognised by
    their content when they are read. The files that were used least recently go first, also after
    a restart, since reading a file sets its time.
    """

    def __init__(self, folder: Path, max_bytes: int, record_bytes: int) -> None:
        """Several engines may be given the same folder: each takes a part that no other uses.
        Raises ConfigurationError if it cannot be used."""
        self._max_bytes = max_bytes
        self._record_bytes = record_bytes
        self._lock = threading.Lock()
        """Held while `_known` is read or written."""
        self._known: OrderedDict[bytes, None] = OrderedDict()
        """Hashes of the files, the least recently used first."""
        if max_bytes < record_bytes:
            raise ConfigurationError(
                f"--kv-offloading-disk-size is {max_bytes} bytes, but a block takes {record_bytes}"
            )
        try:
            self.folder, self._claim = _claim_part(folder)
            dropped = self._read_folder()
            for _ in self._drop_until_there_is_room(0):
                dropped += 1
        except OSError as error:
            raise ConfigurationError(f"--kv-offloading-disk: {one_line(error)}") from error
        logger.info(
            "%s holds %d KV blocks from before%s",
            self.folder,
            len(self._known),
            f"; {dropped} files of others were deleted" if dropped else "",
        )

    def __len__(self) -> int:
        return len(self._known)

    # -- BlockStore ------------------------------------------------------------------------

    def contains(self, hashes: abc.Sequence[bytes]) -> list[bool]:
        with self._lock:
            return [own_hash in self._known for own_hash in hashes]

    def load(self, own_hash: bytes, into: memoryview) -> bool:
        """See BlockStore. A file that cannot be read, or has another size, is deleted."""
        with self._lock:
            if own_hash not in self._known:
                return False
            self._known.move_to_end(own_hash)
        path = self._path(own_hash)
        try:
            with path.open("rb", buffering=0) as file:
                whole = _read_all(file.fileno(), into) and not file.read(1)
            if whole:
                os.utime(path)
        except OSError:
            whole = False
        if not whole:
            self.delete(own_hash)
        return whole

    def store(self, own_hash: bytes, record: memoryview) -> list[bytes]:
        """See BlockStore. Raises OSError if the file cannot be written; then there is none."""
        if not record:
            self.delete(own_hash)
            return []
        dropped = self._drop_until_there_is_room(len(record), keep=own_hash)
        path = self._path(own_hash)
        partial = path.with_suffix(PARTIAL)
        try:
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb", buffering=0) as file:
                _write_all(file.fileno(), record)
            partial.replace(path)
        except OSError:
            for left in (partial, path):
                with contextlib.suppress(OSError):
                    left.unlink()
            raise
        with self._lock:
            self._known[own_hash] = None
            self._known.move_to_end(own_hash)
        return dropped

    def close(self) -> None:
        """Give up the part of the folder; the files stay."""
        os.close(self._claim)

    # -- files -----------------------------------------------------------------------------

    def delete(self, own_hash: bytes) -> None:
        """Delete a record, if it is there."""
        with self._lock:
            self._known.pop(own_hash, None)
        with contextlib.suppress(OSError):
            self._path(own_hash).unlink()

    def _path(self, own_hash: bytes) -> Path:
        name = own_hash.hex()
        return self.folder / name[:2] / f"{name}{SUFFIX}"

    def _drop_until_there_is_room(self, size: int, keep: bytes | None = None) -> list[bytes]:
        """Delete the least recently used files, except `keep`, until `size` bytes more fit."""
        dropped = []
        with self._lock:
            if keep is not None:
                self._known.pop(keep, None)
            room = (self._max_bytes - size) // self._record_bytes
            while len(self._known) > room:
                dropped.append(self._known.popitem(last=False)[0])
        for own_hash in dropped:
            with contextlib.suppress(FileNotFoundError):
                self._path(own_hash).unlink()
        return dropped

    def _read_folder(self) -> int:
        """Find the records of an earlier process, and delete what is left of others: half written
        ones and those of another size. Returns how many were deleted."""
        found: list[_Found] = []
        dropped = 0
        for folder in [each for each in os.scandir(self.folder) if each.is_dir()]:
            for entry in os.scandir(folder.path):
                if not entry.name.endswith((SUFFIX, PARTIAL)):
                    continue
                own_hash = _hash_of(entry.name)
                facts = entry.stat(follow_symlinks=False)
                if own_hash is None or facts.st_size != self._record_bytes:
                    os.unlink(entry.path)
                    dropped += 1
                else:
                    found.append(_Found(facts.st_mtime_ns, own_hash))
        self._known = OrderedDict((one.own_hash, None) for one in sorted(found))
        return dropped


class _Found(NamedTuple):
    time: int
    own_hash: bytes


def _claim_part(folder: Path) -> tuple[Path, int]:
    """Return a part of the folder that no living process uses, and the file that is locked for as
    long as this one does. Raises OSError."""
    folder = folder.expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(MAX_ENGINES):
        part = folder / f"engine-{number}"
        part.mkdir(mode=0o700, exist_ok=True)
        claim = os.open(part / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(claim)
        else:
            return part, claim
    raise OSError(f"{folder} is used by {MAX_ENGINES} engines")


def _hash_of(name: str) -> bytes | None:
    """Return the hash that a file's name says, or None if it is not that of a record."""
    digits, dot, ending = name.partition(".")
    if dot + ending != SUFFIX or len(digits) not in HASH_DIGITS:
        return None
    try:
        return bytes.fromhex(digits)
    except ValueError:
        return None


def _read_all(file: int, into: memoryview) -> bool:
    """Fill `into` from a file; return False if the file is shorter."""
    while len(into):
        count = os.readv(file, [into])
        if count == 0:
            return False
        into = into[count:]
    return True


def _write_all(file: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(file, data) :]
