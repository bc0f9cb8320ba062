"""The memory in which all HTTP workers count: what is in flight, and what each key has used."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import NamedTuple

from ..http.limits import no_loads
from ..tenants.rates import rates_size


class SharedCounters(NamedTuple):
    """Views of the shared memory: `loads` as in http/limits.py, `rates` as in tenants/rates.py."""

    loads: memoryview[int]
    rates: memoryview[int]

    @classmethod
    def open(cls, descriptor: int, processes: int) -> SharedCounters:
        """Map the memory that `create` made for so many processes."""
        size = no_loads(processes).nbytes
        memory = memoryview(mmap.mmap(descriptor, size + rates_size(processes))).cast("q")
        return cls(memory[: size // 8], memory[size // 8 :])


def create(processes: int) -> int:
    """Return the descriptor of zeroed memory for the counters of so many processes."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("quire-counters")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, no_loads(processes).nbytes + rates_size(processes))
    return descriptor
