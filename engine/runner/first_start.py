"""What the engine's process begins before its slow imports. This module imports none but torch."""

from __future__ import annotations

import torch

from ..config import EngineConfig


def compile_ahead(config: EngineConfig) -> None:
    """On the CPU, begin to compile the model's kernels in a process of its own, if this
    installation has not compiled them. See `kernels.cpu.ahead`."""
    if config.device != "cpu" and (config.device != "auto" or torch.cuda.is_available()):
        return
    from ...kernels.cpu import ahead

    dtype = "float32" if config.dtype == "auto" else config.dtype
    ahead.compile_ahead(dtype, int8=config.quantization == "int8")
