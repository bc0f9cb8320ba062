"""A GPU's memory, as the driver and torch count it."""

from __future__ import annotations

import gc

import torch


def free_memory(device: torch.device) -> int:
    """Return the bytes that the driver could give, once torch has given back what it does not
    use."""
    gc.collect()  # a runner and its graphs hold each other
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def total_memory(device: torch.device) -> int:
    """Return the device's bytes."""
    return torch.cuda.mem_get_info(device)[1]


def others_memory(device: torch.device) -> int:
    """Return the bytes that torch's allocator does not hold: the context's, the libraries', and
    those of other processes."""
    return total_memory(device) - free_memory(device) - torch.cuda.memory_reserved(device)
