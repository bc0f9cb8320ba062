"""A folder for sockets in the temporary directory, which does not stay if its process is killed."""

from __future__ import annotations

import contextlib
import errno
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
MAX_PATH = 107 - len("quire-run-12345678/engine") - 1
"""Maximum length of the folder that holds it: a socket's path has at most 107 bytes."""
MIN_AGE_SECONDS = 60.0
"""Younger folders are left alone: their process may not have locked them yet."""


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder that only this user may enter, and remove it at the end.

    It stays locked while this process lives, so that the next server can tell which folders belong
    to processes that were killed; those are removed first. Raises OSError if it cannot be made.
    """
    parent = _parent()
    remove_abandoned(parent)
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # mode 0700
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, path, ignore_errors=True)  # it may have been removed already
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def _parent() -> Path:
    """Return the temporary directory, or a shorter one if sockets' paths would be too long there.

    Raises OSError if there is none.
    """
    wanted = tempfile.gettempdir()
    for folder in (wanted, os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp", "/dev/shm"):
        short = 0 < len(os.fsencode(folder)) <= MAX_PATH
        if short and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    raise OSError(
        errno.ENAMETOOLONG,
        f"{wanted} is too long for the paths of sockets, of {MAX_PATH} bytes at most, and no other "
        "folder can be written: set TMPDIR",
    )


def remove_abandoned(parent: Path) -> None:
    """Remove this user's folders in `parent` that no process holds and that contain nothing but
    sockets."""
    for path in parent.glob(f"{PREFIX}*"):
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
