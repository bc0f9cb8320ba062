"""The choice of a device: the one place that knows them all."""

from __future__ import annotations

import torch

from ..config import EngineConfig
from ..errors import ConfigurationError
from .backend import Backend


def choose_backend(config: EngineConfig) -> Backend:
    """Return the backend of `config.device`; "auto" is a GPU if there is one, else the CPU.

    Only the chosen device's modules are imported. Raises ConfigurationError if a GPU is asked for
    and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigurationError("device is cuda, but torch sees no GPU")
    if config.device == "cuda" or (config.device == "auto" and has_gpu):
        from .cuda.backend import CudaBackend

        return CudaBackend()
    from .cpu.backend import CpuBackend

    return CpuBackend()
