"""The KV cache in main memory: how large it may be, and its pages."""

from __future__ import annotations

import errno
import mmap
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...config import SNAPSHOT_SHARE
from ...errors import ConfigurationError
from ...layers.layer_groups import blocks_needed
from ...main_memory import available_memory
from ..backend import CacheDemand

if TYPE_CHECKING:
    from numpy.typing import NDArray

TYPICAL_TOKENS = 2048
"""Expected tokens of a sequence, for sizing the cache by max_num_seqs."""
LARGE_PAGE = 2 << 20
_ARENA_BYTES = 64 << 20
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
CPU_MEMORY_SHARE = 0.4
"""Maximum share of the available memory that the cache takes by default."""


def cache_memory(demand: CacheDemand, budget: int) -> int:
    """Return the bytes for the cache: `config.kv_cache_memory_bytes`, or by default room for
    max_num_seqs sequences of typical length (at least for one of full length) and the `budget` of
    tokens of a step, limited to a share of the available memory, which the ranks of a host share
    out. What LoRA adapters and evicted blocks will take is not available. The states of running
    sequences and their snapshots are a part of the cache.

    Raises ConfigurationError if more is asked for than is available: the system would kill the
    process once it used that much.
    """
    config, max_model_len = demand.config, demand.max_model_len
    available, asked = available_memory(), config.kv_cache_memory_bytes
    if available is not None:
        others = demand.adapter_bytes + (config.kv_offloading_size or 0)
        available = max(available - others, 0)
    if asked is not None:
        if available is not None and asked > available:
            raise ConfigurationError(
                f"--kv-cache-memory is {asked / 2**30:.2f} GiB, but beside the model only "
                f"{available / 2**30:.2f} GiB of memory are available"
            )
        return asked
    windows, size = demand.group_windows, config.block_size
    typical = min(max_model_len, TYPICAL_TOKENS)
    blocks = max(
        blocks_needed(windows, size, max_model_len, step_tokens=2 * budget),
        blocks_needed(windows, size, typical, width=config.max_num_seqs, step_tokens=budget),
    )
    null_block = any(window is not None for window in windows)
    wanted = (blocks + null_block) * demand.block_bytes
    if demand.state_bytes:
        wanted += demand.state_bytes + wanted // SNAPSHOT_SHARE
    share = CPU_MEMORY_SHARE / config.num_peers / config.ranks_per_node
    return wanted if available is None else min(wanted, int(available * share))


def allocate_kv_cache(
    shape: tuple[int, ...], size: int, dtype: torch.dtype, *, commit: bool
) -> torch.Tensor:
    """Allocate `size` zeroed bytes as a tensor of this shape. Their memory is taken as they are
    first written, or now if `commit`. Raises OSError if less memory is available."""
    available = available_memory()
    if available is not None and size > available:
        raise OSError(errno.ENOMEM, f"only {available} bytes of memory are available")
    # Taking it in small pages costs a fifth of a prefill.
    cache = torch.frombuffer(_large_pages(size), dtype=dtype).view(shape)
    return cache.zero_() if commit else cache


def in_large_pages(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a copy as an array that kernels take, in memory of large pages: a processor reads
    ahead only within a page, and looks up where each one is."""
    stored = tensor.view(_BITS.get(tensor.dtype, tensor.dtype))
    size = stored.numel() * stored.element_size()
    place = torch.frombuffer(_arena.take(size), dtype=torch.uint8, count=size) if size else None
    if place is None:
        return stored.contiguous().numpy()
    copy = place.view(stored.dtype).view(stored.shape)
    copy.copy_(stored)
    return copy.numpy()


class _Arena:
    """Hands out memory of large pages, many arrays from one mapping, which lasts as long as the
    last of its arrays."""

    def __init__(self) -> None:
        self._rest = memoryview(b"")

    def take(self, size: int) -> memoryview:
        """Return zeroed bytes that begin at a cache line."""
        if size > len(self._rest):
            pages = memoryview(_large_pages(max(size, _ARENA_BYTES) + LARGE_PAGE))
            address = np.frombuffer(pages, np.uint8).ctypes.data
            self._rest = pages[-address % LARGE_PAGE :]
        taken, self._rest = self._rest[:size], self._rest[-(-size // 64) * 64 :]
        return taken


_arena = _Arena()


def _large_pages(size: int) -> mmap.mmap:
    """Return zeroed private memory, of pages of 2 MiB if the system has them. It is taken as it is
    first written."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system that was built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
