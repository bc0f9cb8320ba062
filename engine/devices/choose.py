"""The choice of a device: the one place that knows them all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from ..config import EngineConfig
from ..errors import ConfigurationError

if TYPE_CHECKING:
    from .backend import Backend


def _is_gpu(config: EngineConfig) -> bool:
    """Return whether `config.device` is a GPU; "auto" is one if there is one."""
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def before_imports(config: EngineConfig) -> None:
    """Do what a device needs before the engine imports transformers and loads the model.

    Called in the engine's own process only. It changes what later imports find.
    """
    if _is_gpu(config):
        return
    from .cpu.first_start import compile_ahead, leave_triton_out

    if not config.trust_remote_code:  # the model's own code may use triton
        leave_triton_out()
    compile_ahead(config)


def choose_backend(config: EngineConfig, place: int = 0) -> Backend:
    """Return the backend of `config.device`; "auto" is a GPU if there is one, else the CPU.
    `place` counts this host's ranks from 0: each has a GPU of its own.

    Only the chosen device's modules are imported. Raises ConfigurationError if a GPU is asked for
    and there is none, or if it is too old for the kernels.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device is cuda, but torch sees no GPU")
    if _is_gpu(config):
        # The kernels are checked with products and sums fused, which Triton 3.10 will not do unless
        # it is told to, and which 3.9 warns of.
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        from .cuda.backend import CudaBackend, require_gpu
        from .cuda.layers.kernels import TRITON, TRITON_PDL

        require_gpu(pdl=config.enable_pdl)
        return CudaBackend(torch.device("cuda", place), TRITON_PDL if config.enable_pdl else TRITON)
    if config.enable_pdl:
        raise ConfigurationError("--enable-pdl works only on a GPU")
    from .cpu.backend import CpuBackend

    return CpuBackend()
