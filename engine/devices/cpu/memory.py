"""The KV cache in main memory: how large it may be, and its pages."""

from __future__ import annotations

import errno
import mmap

import torch

from ...errors import ConfigurationError
from ...layers.layer_groups import blocks_needed
from ...main_memory import available_memory
from ..backend import CacheDemand

TYPICAL_TOKENS = 2048
"""Expected tokens of a sequence, for sizing the cache by max_num_seqs."""
CPU_MEMORY_SHARE = 0.4
"""Maximum share of the available memory that the cache takes by default."""


def cache_memory(demand: CacheDemand, budget: int) -> int:
    """Return the bytes for the cache: `config.kv_cache_memory_bytes`, or by default room for
    max_num_seqs sequences of typical length (at least for one of full length) and the `budget` of
    tokens of a step, limited to a share of the available memory, which the ranks of a host share
    out. What LoRA adapters and evicted blocks will take is not available.

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
    # Anonymous pages are zero, and take memory once they are written. Huge pages, because taking
    # it in 4 KiB pages costs a fifth of a prefill.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    cache = torch.frombuffer(pages, dtype=dtype).view(shape)
    return cache.zero_() if commit else cache
