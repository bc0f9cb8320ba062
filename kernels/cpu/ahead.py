"""A process that compiles a model's kernels while the engine is still starting.

    python -P -m quire.kernels.cpu.ahead float32 [float16 [int8]]

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
from typing import Any, NamedTuple

import numpy as np

from .attention import make_scratch
from .numbers import CACHE
from .products import FloatWeight, PackedWeight, make_quantised, make_tiles
from .region import Task, compile_region, is_compiled
from .sampling import Best, draw_task
from .step import (
    PRODUCTS,
    Activations,
    BodyStep,
    Ends,
    Layers,
    Scratch,
    lasting_calls,
    step_calls,
    tasks_of,
)

_DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.int16, "int8": np.int8}
"""NumPy's types for torch's, see `numbers.py`; int8 is one of caches only."""


KEPT = "kept"
"""In place of a quantisation: weights of a checkpoint's own 4 or 8 bits. Which kinds they are is
known when they are read, so that kernels of products are not compiled ahead."""


class Build(NamedTuple):
    """What kernels are compiled for: torch's names of the types of a model and of its KV cache, and
    how its weights are quantised, empty if they are not."""

    dtype: str
    kv_cache_dtype: str
    quantization: str = ""


def tasks_for(build: Build) -> list[Task]:
    """Return all kernels of a Llama-shaped model, those of products excepted if its weights are
    KEPT."""
    floats, cache = (np.dtype(_DTYPES[name]) for name in build[:2])
    head: PackedWeight = FloatWeight(_zeros(floats, 3), _zeros(np.float32, 1))
    weight = head
    is_kept = build.quantization == KEPT
    if build.quantization:
        from .integer.products import weight_like  # which imports this room

        head = weight_like("int8")
        weight = head if is_kept else weight_like(build.quantization)
    line, rows, heads = (_zeros(np.float32, ndim) for ndim in (1, 2, 3))
    words, pairs, starts = _zeros(np.int64, 1), _zeros(np.int64, 2), _zeros(np.int32, 1)
    products = (weight,)
    layers = Layers(
        *(rows, products, heads, products, rows, products, products, rows, rows),
        *(line, line, line, line, line, line, words, words, words),
        norms_all_heads=False,
        rotates_pairs=False,
    )
    ends = Ends(_zeros(floats, 2), head)
    best = Best(rows, rows.view(np.int32), line, words, line.astype(np.bool_))
    activations = Activations(rows, rows, heads, heads, heads, rows, rows, rows, rows, best)
    step = BodyStep(
        *(words, words, pairs, words, 1, rows, rows, pairs, _zeros(np.int32, 3), starts, starts),
        *(pairs, pairs),
        tile_queries=1,
        picked_only=False,
    )
    scratch = Scratch(make_tiles(1), make_scratch(1, 1, 1), make_quantised(1, 1, 1))
    calls = lasting_calls(ends, layers, activations, scratch)
    calls |= step_calls(ends, layers, _zeros(cache, 6), step, activations, scratch)
    if is_kept:
        calls = {place: call for place, call in calls.items() if place[0] not in PRODUCTS}
    return [*tasks_of(calls), draw_task()]


def compile_ahead(build: Build) -> None:
    """Start the process, unless all is compiled or there is no second core to run it on.

    An unknown dtype is left to whoever refuses it.
    """
    if not _DTYPES.keys() >= set(build[:2]) or _cores() < 2 or is_compiled(tasks_for(build)):
        return
    null = subprocess.DEVNULL
    command = [sys.executable, "-P", "-m", __name__, *filter(None, build)]
    where = {**os.environ, "NUMBA_CACHE_DIR": str(CACHE.parent)}
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, env=where)
    threading.Thread(target=process.wait, daemon=True).start()  # leaves no zombie


def _zeros(dtype: Any, ndim: int) -> np.ndarray[Any, Any]:
    return np.zeros((1,) * ndim, dtype=dtype)


def _cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def main() -> None:
    """Compile, the longest first."""
    dtype, *others = sys.argv[1:]
    build = Build(dtype, *(others or [dtype]))
    for kernel, signature in reversed(tasks_for(build)):
        kernel.compile(signature)
    compile_region()


if __name__ == "__main__":
    main()
