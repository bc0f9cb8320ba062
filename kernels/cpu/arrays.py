"""Tensors as the arrays that kernels take, and how many threads they get."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from . import numbers  # noqa: F401  (Numba's options)

# Numba's threads are torch's own. Before the first kernel, after which Numba reads it no more.
numba.config.NUMBA_NUM_THREADS = torch.get_num_threads()

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
FLOATS = {torch.float32, *_BITS}
"""The types that weights, K and V may have."""


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the same memory, made contiguous, as kernels take it."""
    bits = _BITS.get(tensor.dtype)
    tensor = tensor.contiguous()
    return (tensor if bits is None else tensor.view(bits)).numpy()


def thread_count() -> int:
    """Return the number of threads for a kernel: torch's, which may have been lowered since this
    module was imported."""
    return min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS))
