"""The KV cache's tensor, and how large it may be.

Layout `[num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim]`: a (block, head) tile is
contiguous, which is what the attention kernels read.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

from ..config import EngineConfig
from ..errors import ConfigurationError
from ..model.model_spec import ModelSpec

TYPICAL_TOKENS = 2048
"""Tokens a sequence is expected to hold, where the CPU's cache is sized for max_num_seqs."""
CPU_MEMORY_SHARE = 0.4
"""Most of the available memory that a CPU cache takes by default."""


def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, K and V."""
    return block_size * spec.kv_bytes_per_token(dtype.itemsize)


def allocate_kv_cache(
    spec: ModelSpec,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    commit: bool = False,
) -> torch.Tensor:
    """Zeroed, so that a slot never written holds no NaN. Main memory is taken as it is first
    written, or now, to `commit` it. Raises ConfigurationError where the device has no room."""
    shape = (spec.num_layers, 2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
    size = num_blocks * block_bytes(spec, block_size, dtype)
    try:
        if device.type == "cpu":
            # Anonymous pages are zero, and take memory once they are written. Large ones: to take
            # it by 4 KiB is a fifth of a prefill.
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                pages.madvise(mmap.MADV_HUGEPAGE)
            cache = torch.frombuffer(pages, dtype=dtype).view(shape)
            return cache.zero_() if commit else cache
        return torch.zeros(size, dtype=torch.uint8, device=device).view(dtype).view(shape)
    except (torch.OutOfMemoryError, RuntimeError, OSError) as error:
        raise ConfigurationError(
            f"a KV cache of {num_blocks} blocks ({_gib(size)}) does not fit the memory of {device}"
        ) from error


def num_blocks_from_memory(
    memory: int, config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, max_model_len: int
) -> int:
    """Blocks that `memory` bytes hold, or `config.num_blocks` where that is given.

    Raises ConfigurationError where not one sequence of max_model_len tokens would fit.
    """
    size = block_bytes(spec, config.block_size, dtype)
    num_blocks = max(memory, 0) // size if config.num_blocks is None else config.num_blocks
    if num_blocks <= 0:
        raise ConfigurationError(
            f"no memory is left for the KV cache ({_gib(memory)} beside the model; a block takes "
            f"{size} bytes): use a smaller model or raise --gpu-memory-utilization"
        )
    # The last token of a sequence is never fed back, so it needs no slot.
    if num_blocks * config.block_size < max_model_len - 1:
        raise ConfigurationError(
            f"the KV cache holds {num_blocks * config.block_size} tokens, less than one sequence "
            f"of {max_model_len}: give it more memory or set --max-model-len "
            f"{num_blocks * config.block_size} or less"
        )
    return num_blocks


def cpu_cache_memory(
    config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, max_model_len: int
) -> int:
    """Bytes for the cache in main memory: `config.kv_cache_memory_bytes`, or by default room for
    max_num_seqs sequences of typical length (at least one of full length), as far as that stays
    within a share of what is available. Raises ConfigurationError where more is asked for than is
    available: to take that would have the system kill the process."""
    available, asked = available_memory(), config.kv_cache_memory_bytes
    if asked is not None:
        if available is not None and asked > available:
            raise ConfigurationError(
                f"--kv-cache-memory is {_gib(asked)}, but beside the model only "
                f"{_gib(available)} of memory are available"
            )
        return asked
    tokens = max(max_model_len, config.max_num_seqs * min(max_model_len, TYPICAL_TOKENS))
    blocks = -(-tokens // config.block_size)
    wanted = blocks * block_bytes(spec, config.block_size, dtype)
    return wanted if available is None else min(wanted, int(available * CPU_MEMORY_SHARE))


def available_memory() -> int | None:
    """Bytes that this process may still take without swapping: the system's, or its control
    group's where that is less. None where the system does not say."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        found.append(int(text) - int(used.read_text()))
    return min(found) if found else None


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
