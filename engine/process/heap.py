"""What a process does about its memory once it is up: nothing of its start is walked or kept."""

from __future__ import annotations

import ctypes
import gc
import sys


def settle() -> None:
    """After loading: collect, take what stays out of later collections, and give the pages back
    that nobody uses, which malloc would keep (tens of megabytes; glibc alone has a call for it)."""
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
