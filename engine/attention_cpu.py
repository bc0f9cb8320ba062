"""Attention and a flat body's other operations on the CPU: cut a step into tiles, call the kernels.

Importing this loads Numba: only a worker on the CPU does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np
import torch

from . import cpu_attention, cpu_kernels
from .cpu_numbers import as_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .attention import AttentionMetadata
    from .flat_decoder import FlatLayer, Norm, Rotation

# The first is torch's own pool of threads, where the system has GNU's OpenMP.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

ALONE = 2048
"""Keys and new tokens of a step up to which waking a second thread costs more than it gains."""
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
    counts = np.diff(query_start_loc)
    size = max(1, cpu_attention.TILE_ROWS // group) if counts.max() > 1 else 1
    tiles_of = -(-counts // size)
    sequences = np.repeat(np.arange(len(counts)), tiles_of)
    firsts = (
        np.arange(len(sequences)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
    ) * size
    work = np.minimum(counts[sequences] - firsts, size) * seq_lens[sequences]
    order = np.argsort(-work, kind="stable")
    is_small = int(seq_lens.sum()) + int(query_start_loc[-1]) <= ALONE
    most = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    return CpuPlan(
        np.stack((sequences, firsts), axis=1)[order].astype(np.int64), size, 1 if is_small else most
    )


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
    numba.set_num_threads(_plan(metadata).num_threads)
    stored = as_array(cache)
    cpu_kernels.store_kv(as_array(key), as_array(value), metadata.slot_mapping.numpy(), stored)
    return _attend(query, stored, metadata, scale, window, softcap, sinks)


def _plan(metadata: AttentionMetadata) -> CpuPlan:
    assert metadata.cpu_plan is not None
    return metadata.cpu_plan


def _attend(
    query: torch.Tensor,
    cache: NDArray[Any],
    metadata: AttentionMetadata,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    plan = _plan(metadata)
    output = torch.empty(query.shape, dtype=query.dtype)
    cpu_attention.attend(
        as_array(query),
        cache,
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


class CpuOps(NamedTuple):
    """BodyOps of one step over `metadata`, each a single pass."""

    metadata: AttentionMetadata

    def add_norm(self, x: torch.Tensor, update: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        numba.set_num_threads(_plan(self.metadata).num_threads)
        output = torch.empty_like(x)
        rows = as_array(x)
        has_update = update is not None
        cpu_kernels.add_norm(
            rows,
            rows if update is None else as_array(update),
            has_update,
            as_array(norm.weight),
            np.float32(norm.eps),
            as_array(output),
        )
        return output

    def attend(self, layer: FlatLayer, qkv: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        cache = as_array(self.metadata.kv_cache[layer.layer_idx])
        query = qkv.new_empty(len(qkv), layer.num_heads, layer.head_dim)
        heads = as_array(qkv.view(len(qkv), -1, layer.head_dim))
        cpu_kernels.rotate_and_store(
            heads,
            heads[0] if layer.qk_norm is None else as_array(layer.qk_norm.weight),
            layer.qk_norm is not None,
            np.float32(0.0 if layer.qk_norm is None else layer.qk_norm.eps),
            as_array(rotation.cos),
            as_array(rotation.sin),
            self.metadata.slot_mapping.numpy(),
            cache,
            as_array(query),
        )
        attended = _attend(query, cache, self.metadata, layer.scale, layer.window)
        return attended.view(len(qkv), -1)

    def activate(self, layer: FlatLayer, gate_up: torch.Tensor) -> torch.Tensor:
        if not layer.is_silu:
            gate, up = gate_up.chunk(2, dim=-1)
            return layer.activation(gate) * up
        output = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        cpu_kernels.silu_and_mul(as_array(gate_up), as_array(output))
        return output
