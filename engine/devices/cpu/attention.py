"""Attention on the CPU: cut a step into tiles, then call the kernels in every layer.

Importing this loads Numba.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

from ....kernels.cpu import attention as cpu_attention
from ....kernels.cpu import norms as cpu_kernels
from ....kernels.cpu.arrays import as_array, thread_count
from ....kernels.cpu.latent.attention import attend_latents
from ....kernels.cpu.softmax import KEYS
from ....kernels.cpu.step import one_a_tile
from ....kernels.prefix_groups import find_prefix_groups
from ...attention.metadata import AttentionMetadata
from ..steps import DeviceStep, HostStep

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NO_SINKS = np.zeros(1, dtype=np.float32)
_MIN_SHARED_TOKENS = 2 * KEYS


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """The AttentionPlan of one step: its tiles as in `cpu_attention.Batch`, those with most work
    first, for all layers."""

    tiles: NDArray[np.int64]
    members: NDArray[np.int64]
    tile_queries: int
    num_threads: int

    def attend(
        self,
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
        kv_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert kv_scales is None, "the CPU has no float8 cache"
        stored = as_array(cache)
        numba.set_num_threads(self.num_threads)
        slots = metadata.slot_mapping.numpy()
        cpu_kernels.store_kv(as_array(key), as_array(value), slots, stored, self.num_threads)
        output = torch.empty(query.shape, dtype=query.dtype)
        batch = self._batch(metadata)
        scoring = cpu_attention.Scoring(
            np.float32(scale),
            window or 0,
            np.float32(softcap or 0.0),
            _NO_SINKS if sinks is None else sinks.float().numpy(),
            sinks is not None,
        )
        cpu_attention.attend(
            as_array(query), stored, batch, scoring, self.num_threads, as_array(output)
        )
        return output

    def attend_latents(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        cache: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        value_width: int,
    ) -> torch.Tensor:
        numba.set_num_threads(self.num_threads)
        output = torch.empty((*query.shape[:2], value_width), dtype=query.dtype)
        attend_latents(
            as_array(query),
            as_array(latents),
            metadata.slot_mapping.numpy(),
            as_array(cache),
            self._batch(metadata),
            scale,
            self.num_threads,
            as_array(output),
        )
        return output

    def _batch(self, metadata: AttentionMetadata) -> cpu_attention.Batch:
        return cpu_attention.Batch(
            metadata.block_table.numpy(),
            metadata.query_start_loc.numpy(),
            metadata.seq_lens.numpy(),
            self.tiles,
            self.members,
            self.tile_queries,
        )


@dataclass(frozen=True)
class SharingCost:
    """A `prefix_groups.GroupCost`: what decodes save if each tile of rows reads their common
    beginning once."""

    members_per_tile: int
    token_bytes: int
    """Bytes of K and V of one token in one layer."""
    query_len: int = 1

    def saved_bytes(self, members: int, length: int) -> float:
        return float((members - -(-members // self.members_per_tile)) * length * self.token_bytes)


class CpuPlanner:
    """Planner of the steps over one KV cache."""

    def __init__(self, num_heads: int, kv_cache: torch.Tensor, *, shares: bool = True) -> None:
        """Plan for models of `num_heads` and a cache `[layers, parts, blocks, num_kv_heads,
        block_size, head_dim]`, whose parts are K and V, or 1 of latents. With `shares`, decodes
        read a common beginning together."""
        _, parts, _, self._kv_heads, self._block_size, head_dim = kv_cache.shape
        self._tile_queries = max(1, cpu_attention.TILE_ROWS // (num_heads // self._kv_heads))
        self._token_bytes = parts * self._kv_heads * head_dim * kv_cache.element_size()
        self._shares = shares
        self.query_len = 1
        """Rows are never padded."""

    def find_shared(self, host: HostStep) -> bool:
        """Return False: tiles that share a prefix need no kernel of their own, and `plan` finds
        them."""
        return False

    def plan(
        self,
        query_start_loc: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
        num_decodes: int,
        step: DeviceStep,
        *,
        shared: bool = False,
        query_len: int = 1,
    ) -> CpuPlan:
        return self.cut(query_start_loc, seq_lens, step.block_table.numpy()[0, :num_decodes])

    def cut(
        self,
        query_start_loc: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
        decode_tables: NDArray[np.int32] | None = None,
    ) -> CpuPlan:
        """Cut a step into tiles.

        query_start_loc and seq_lens are as in AttentionMetadata; decode_tables `[num_decodes, …]`
        are the block tables of the first rows, those with one token, in the first group of layers.
        The tiles are those of all groups: layers with a window read no key for several rows, since
        one row's table may lack a block that another one needs.
        """
        num_threads = thread_count()
        # 1. Decodes that share a prefix stand in one tile, which reads it once.
        shared: list[tuple[NDArray[np.int64], int]] = []
        if self._shares and decode_tables is not None:
            shared = self._tiles_that_share(decode_tables, seq_lens, num_threads)
        # 2. The usual case: one token a row and nothing shared. Every row is a tile.
        if query_start_loc[-1] == len(seq_lens) and not shared:
            members = np.zeros((len(seq_lens), 2), dtype=np.int64)
            members[:, 0] = np.argsort(-seq_lens, kind="stable")
            return CpuPlan(one_a_tile(len(members)), members, 1, num_threads)
        # 3. All other rows are cut into tiles of `size` queries.
        counts, size = np.diff(query_start_loc), self._tile_queries
        counts[[row for rows, _ in shared for row in rows]] = 0
        tiles_of = -(-counts // size)
        sequences = np.repeat(np.arange(len(counts)), tiles_of)
        firsts = (
            np.arange(len(sequences)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
        ) * size
        work = np.minimum(counts[sequences] - firsts, size) * seq_lens[sequences]
        members = np.stack((sequences, firsts), axis=1)
        tiles = one_a_tile(len(members))
        for rows, length in shared:
            tile = (len(members), len(members) + len(rows), length)
            tiles = np.append(tiles, [tile], axis=0)
            members = np.append(members, np.stack((rows, np.zeros_like(rows)), axis=1), axis=0)
            work = np.append(work, seq_lens[rows].sum())
        # 4. Threads take tiles in this order: the longest first, so that no thread is left with a
        # long one at the end.
        order = np.argsort(-work, kind="stable")
        return CpuPlan(tiles[order], members.astype(np.int64), size, num_threads)

    def _tiles_that_share(
        self, tables: NDArray[np.int32], seq_lens: NDArray[np.int32], num_threads: int
    ) -> list[tuple[NDArray[np.int64], int]]:
        """Return the rows of each tile, and how many keys they read once."""
        # Large tiles save most, but every thread needs one.
        most = min(self._tile_queries, len(tables) * self._kv_heads // num_threads)
        if most < 2:
            return []
        groups = find_prefix_groups(
            list(tables),
            seq_lens[: len(tables)].tolist(),
            self._block_size,
            SharingCost(most, self._token_bytes),
            tile=KEYS,
            min_tokens=_MIN_SHARED_TOKENS,
            min_members=2,
            launch_bytes=0.0,
        )
        return [
            (rows, length)
            for members, length in groups
            for rows in np.array_split(members, -(-len(members) // most))
        ]
