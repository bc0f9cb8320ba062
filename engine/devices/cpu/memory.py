"""The KV cache in main memory: how large it may be, and its pages."""

from __future__ import annotations

import errno
import mmap

import torch

from ...config import EngineConfig
from ...errors import ConfigurationError
from ...main_memory import available_memory

TYPICAL_TOKENS = 2048
"""Expected tokens of a sequence, for sizing the cache by max_num_seqs."""
CPU_MEMORY_SHARE = 0.4
"""Maximum share of the available memory that the cache takes by default."""


def cache_memory(
    config: EngineConfig, block_bytes: int, max_model_len: int, other_bytes: int = 0
) -> int:
    """Return the bytes for the cache: `config.kv_cache_memory_bytes`, or by default room for
    max_num_seqs sequences of typical length (at least for one of full length), limited to a share
    of the available memory, which the ranks of a host share out. `other_bytes` are not available:
    LoRA adapters or evicted blocks will take them.

    Raises ConfigurationError if more is asked for than is available: the system would kill the
    process once it used that much.
    """
    available, asked = available_memory(), config.kv_cache_memory_bytes
    if available is not None:
        available = max(available - other_bytes, 0)
    if asked is not None:
        if available is not None and asked > available:
            raise ConfigurationError(
                f"--kv-cache-memory is {asked / 2**30:.2f} GiB, but beside the model only "
                f"{available / 2**30:.2f} GiB of memory are available"
            )
        return asked
    tokens = max(max_model_len, config.max_num_seqs * min(max_model_len, TYPICAL_TOKENS))
    wanted = -(-tokens // config.block_size) * block_bytes
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
