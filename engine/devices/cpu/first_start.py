"""What the engine's process does for the CPU before it imports transformers."""

from __future__ import annotations

import sys

from ....kernels.cpu import ahead
from ...config import EngineConfig


def leave_triton_out() -> None:
    """Make triton look as if it were not installed, which saves 70 MB.

    transformers imports torch._dynamo, which imports triton if it finds it. None in sys.modules is
    Python's own way to mark a module as absent. (torch's builds for CPUs come without triton, so
    this is a state that both libraries know.)
    """
    sys.modules.setdefault("triton", None)  # type: ignore[arg-type]


def compile_ahead(config: EngineConfig) -> None:
    """Begin to compile the model's kernels in a process beside this one, if this installation has
    not compiled them: see `kernels.cpu.ahead`."""
    dtype, cache = config.dtype, config.kv_cache_dtype
    if cache == "auto":  # see `CpuBackend.kv_cache_dtype`
        cache = "float16" if dtype == "auto" else dtype
    dtype = "float32" if dtype == "auto" else dtype
    ahead.compile_ahead(ahead.Build(dtype, cache, config.quantization or ""))
