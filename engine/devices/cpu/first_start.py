"""What the engine's process does for the CPU before it imports transformers."""

from __future__ import annotations

import sys

from ....kernels.cpu import ahead
from ...config import EngineConfig
from ...errors import StartupError


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
    quantization: str = config.quantization or ""
    if not quantization and _has_own_format(config):
        quantization = ahead.KEPT
    ahead.compile_ahead(ahead.Build(dtype, cache, quantization))


def _has_own_format(config: EngineConfig) -> bool:
    """Whether the checkpoint brings weights of 4 or 8 bits, whose products are of kinds of their
    own. A model that cannot be found is left to who loads it."""
    from ...checkpoints.checkpoint import format_of

    try:
        return format_of(config) is not None
    except StartupError:
        return False
