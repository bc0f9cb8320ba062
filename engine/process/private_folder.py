"""A folder for sockets in the temporary directory, which does not stay if its process is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "quire-run-"
"""How the names of the folders begin."""
MIN_AGE_SECONDS = 60.0
"""Younger folders are left alone: their process may not have locked them yet."""


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder that only this user may enter, and remove it at the end.

    It stays locked while this process lives, so that the next server can tell which folders belong
    to processes that were killed; those are removed first.
    """
    remove_abandoned()
    path = Path(tempfile.mkdtemp(prefix=PREFIX))  # mode 0700
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # it may have been removed already
        os.close(lock)


def remove_abandoned() -> None:
    """Remove this user's folders that no process holds and that contain nothing but sockets."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another process removes it, uses it or owns it
            state = path.lstat()
            if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
                continue
            if time.time() - state.st_mtime < MIN_AGE_SECONDS:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_sockets(path)
                path.rmdir()
            finally:
                os.close(lock)


def _remove_sockets(path: Path) -> None:
    entries = list(path.iterdir())
    if all(entry.is_socket() for entry in entries):
        for entry in entries:
            entry.unlink()
