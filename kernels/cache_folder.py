"""Where compiled kernels are kept: in the first folder that can be written."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

logger = logging.getLogger("quire.kernels")

PREFIX = "quire-numba-"
"""How the names of temporary folders begin."""
MIN_AGE_SECONDS = 60.0
"""Younger folders are left alone: their process may not have locked them yet."""


def cache_folder(name: str, wanted: str, package: Path) -> Path:
    """Return a folder `name` that can be written: below `wanted` (NUMBA_CACHE_DIR) if that is set,
    or else beside the sources, or in the user's cache.

    If none of them can be written it is a temporary one, which is removed when this process ends.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "quire"
    parents = [Path(wanted)] if wanted else [package / "__pycache__", home]
    for parent in parents:
        if is_writable(parent / name):
            return parent / name
    logger.warning(
        "%s cannot be written, so the CPU's kernels are compiled at each start: "
        "set NUMBA_CACHE_DIR to a folder that can be",
        parents[-1],
    )
    return _temporary_folder() / name


def is_writable(folder: Path) -> bool:
    """Return whether files can be made in `folder`, which is made if it is not there."""
    if not folder.is_absolute():  # there is no home to begin with
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary_folder() -> Path:
    """Make a folder that is locked while this process lives, and removed when it ends. Those of
    processes that were killed are removed first."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another process removes it, uses it or owns it
            state = path.lstat()
            if state.st_uid == os.getuid() and time.time() - state.st_mtime > MIN_AGE_SECONDS:
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
                finally:
                    os.close(lock)
    path = Path(tempfile.mkdtemp(prefix=PREFIX))  # mode 0700
    # The lock is held until the process ends.
    fcntl.flock(os.open(path, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_EX)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
