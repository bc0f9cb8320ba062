"""Attention on the CPU: cut a step into tiles, call the kernels.

Importing this loads Numba: only a worker on the CPU does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

from . import cpu_attention, cpu_kernels
from .cpu_numbers import as_array, thread_count

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .attention import AttentionMetadata

_NO_SINKS = np.zeros(1, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """A step cut into tiles of `tile_queries` queries: `[n, 2]` (sequence, its first query), those
    with most work first."""

    tiles: NDArray[np.int64]
    tile_queries: int
    num_threads: int


def build_cpu_plan(
    query_start_loc: NDArray[np.int32], seq_lens: NDArray[np.int32], group: int
) -> CpuPlan:
    """Arrays as in AttentionMetadata, on the host; `group` heads share a KV head."""
    if query_start_loc[-1] == len(seq_lens):  # one token a row: a tile each
        tiles = np.zeros((len(seq_lens), 2), dtype=np.int64)
        tiles[:, 0] = np.argsort(-seq_lens, kind="stable")
        return CpuPlan(tiles, 1, thread_count())
    counts = np.diff(query_start_loc)
    size = max(1, cpu_attention.TILE_ROWS // group)
    tiles_of = -(-counts // size)
    sequences = np.repeat(np.arange(len(counts)), tiles_of)
    firsts = (
        np.arange(len(sequences)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
    ) * size
    work = np.minimum(counts[sequences] - firsts, size) * seq_lens[sequences]
    order = np.argsort(-work, kind="stable")
    tiles = np.stack((sequences, firsts), axis=1)[order].astype(np.int64)
    return CpuPlan(tiles, size, thread_count())


def attend_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query `[T, num_heads, head_dim]`, key and value `[T, num_kv_heads, head_dim]` → like query.

    The cache is one layer's `[2, num_blocks, num_kv_heads, block_size, head_dim]`, contiguous.
    """
    plan, stored = metadata.cpu_plan, as_array(cache)
    assert plan is not None
    numba.set_num_threads(plan.num_threads)
    cpu_kernels.store_kv(as_array(key), as_array(value), metadata.slot_mapping.numpy(), stored)
    output = torch.empty(query.shape, dtype=query.dtype)
    cpu_attention.attend(
        as_array(query),
        stored,
        metadata.block_table.numpy(),
        metadata.query_start_loc.numpy(),
        metadata.seq_lens.numpy(),
        plan.tiles,
        plan.tile_queries,
        np.float32(scale),
        window or 0,
        np.float32(softcap or 0.0),
        _NO_SINKS if sinks is None else sinks.float().numpy(),
        sinks is not None,
        plan.num_threads,
        as_array(output),
    )
    return output
