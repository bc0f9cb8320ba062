"""A process that compiles a model's kernels while the engine is still starting.

    python -P -m quire.kernels.cpu.ahead float32 [int8]

Numba holds a lock while it compiles, and before the engine comes to its kernels it spends seconds
on imports and weights. So the engine starts this process beside it, which compiles the kernels into
the cache on disk, in the opposite order. The two need not talk to each other: a lock keeps them
from compiling the same kernel, and what one of them has finished the other one loads. Should this
process fail, the engine compiles everything by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np

from .body import body_tasks
from .compiling import Task, is_compiled
from .region import compile_region
from .sampling import draw_task

_DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.int16}
"""NumPy's types for torch's, see `numbers.py`."""


def tasks_for(dtype: str, *, int8: bool = False) -> list[Task]:
    """Return all kernels of a Llama-shaped model with weights of this dtype, or of eight bits."""
    floats = np.dtype(_DTYPES[dtype])
    weights = np.dtype(np.int8) if int8 else floats
    return [*body_tasks(floats, weights, weights), draw_task()]


def compile_ahead(dtype: str, *, int8: bool = False) -> None:
    """Start the process, unless all is compiled or there is no second core to run it on.

    An unknown dtype is left to whoever refuses it.
    """
    if dtype not in _DTYPES or _cores() < 2 or is_compiled(tasks_for(dtype, int8=int8)):
        return
    null = subprocess.DEVNULL
    command = [sys.executable, "-P", "-m", __name__, dtype, *(["int8"] if int8 else [])]
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null)
    threading.Thread(target=process.wait, daemon=True).start()  # leaves no zombie


def _cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def main() -> None:
    """Compile, the longest first."""
    dtype, *flags = sys.argv[1:]
    for kernel, signature in reversed(tasks_for(dtype, int8=bool(flags))):
        kernel.compile(signature)
    compile_region()


if __name__ == "__main__":
    main()
