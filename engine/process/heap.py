"""Memory housekeeping of a process that has finished starting."""

from __future__ import annotations

import ctypes
import gc
import sys


def settle() -> None:
    """Exempt what has been loaded from garbage collection, and return unused memory.

    First collect the garbage of the start; then freeze the rest, so that later collections do not
    walk it. On glibc, finally return the free pages that malloc holds, which are tens of megabytes.
    """
    gc.collect()
    gc.freeze()
    trim()


def trim() -> None:
    """Return the free pages that malloc holds to the system, on glibc. Releases Python's lock."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
