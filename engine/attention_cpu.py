"""Paged attention with torch on the CPU: gather blocks into scratch, then attend.

What depends on the step alone (which cache rows to gather, masks) is planned once, per distinct
window, and shared by all layers. Decodes are gathered in groups of similar length, so that padding
is bounded; longer rows attend one sequence at a time, in tiles of queries, so that masks stay
small and half of a causal square is never computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .attention import AttentionMetadata

QUERY_TILE = 256
GROUP_TOKENS = 32_768  # gathered at once: 32 MiB each of K and V at 4 KV heads of 64, float32


class DecodeGroup(NamedTuple):
    """Sequences with one new token, gathered together and padded to the longest.

    rows `[g]` of the batch; cache_rows `[g * num_kv_heads * num_blocks]` of the cache seen as
    `[num_blocks * num_kv_heads, block_size * head_dim]`; mask `[g, 1, 1, keys]`, True attends.
    """

    rows: torch.Tensor
    cache_rows: torch.Tensor
    num_keys: int
    mask: torch.Tensor


class QueryTile(NamedTuple):
    """Queries [start, stop) of the batch against gathered keys [key_start, key_stop)."""

    start: int
    stop: int
    key_start: int
    key_stop: int
    mask: torch.Tensor


class Chunk(NamedTuple):
    """A sequence with several new tokens. cache_rows is None where its keys are its new ones."""

    start: int
    stop: int
    cache_rows: torch.Tensor | None
    tiles: list[QueryTile]


class WindowPlan(NamedTuple):
    decodes: list[DecodeGroup]
    chunks: list[Chunk]


class Scratch:
    """Memory for gathered K and V that outlives a step: fresh pages each time would cost more
    than the gather itself. Grows to the largest gather seen."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor | None] = [None, None]

    def gather(self, index: int, cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Copy `cache[rows]` into buffer `index`, 0 or 1; valid until its next gather."""
        numel = rows.shape[0] * cache.shape[1]
        buffer = self._buffers[index]
        if buffer is None or buffer.numel() < numel:
            self._buffers[index] = buffer = cache.new_empty(numel)
        out = buffer[:numel].view(rows.shape[0], cache.shape[1])
        return torch.index_select(cache, 0, rows, out=out)


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """windows: a plan for each distinct window of the model. write_rows `[T * num_kv_heads]`: where
    this step's K and V go in a cache seen as `[num_blocks * num_kv_heads * block_size, head_dim]`.
    """

    windows: dict[int | None, WindowPlan]
    write_rows: torch.Tensor
    scratch: Scratch


def build_cpu_plan(
    *,
    slot_mapping: NDArray[np.int64],
    block_table: NDArray[np.int32],
    query_start_loc: NDArray[np.int32],
    seq_lens: NDArray[np.int32],
    num_decodes: int,
    num_kv_heads: int,
    block_size: int,
    windows: frozenset[int | None],
    scratch: Scratch,
) -> CpuPlan:
    """Shapes as in AttentionMetadata, on the host."""
    heads = np.arange(num_kv_heads)
    blocks, offsets = np.divmod(slot_mapping, block_size)
    write_rows = (blocks[:, None] * num_kv_heads + heads) * block_size + offsets[:, None]
    layout = _Layout(block_table, query_start_loc, seq_lens, num_decodes, heads, block_size)
    return CpuPlan(
        {window: layout.plan(window) for window in windows},
        torch.from_numpy(write_rows.reshape(-1)),
        scratch,
    )


class _Layout(NamedTuple):
    block_table: NDArray[np.int32]
    query_start_loc: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    num_decodes: int
    heads: NDArray[np.int64]
    block_size: int

    def plan(self, window: int | None) -> WindowPlan:
        return WindowPlan(
            self._decodes(window),
            [self._chunk(row, window) for row in range(self.num_decodes, len(self.seq_lens))],
        )

    def _cache_rows(self, blocks: NDArray[np.int32]) -> torch.Tensor:
        """Block ids `[..., n]` → flat cache rows ordered `[..., num_kv_heads, n]`."""
        rows = blocks[..., None, :].astype(np.int64) * len(self.heads) + self.heads[:, None]
        return torch.from_numpy(rows.reshape(-1))

    def _decodes(self, window: int | None) -> list[DecodeGroup]:
        if self.num_decodes == 0:
            return []
        stop = self.seq_lens[: self.num_decodes].astype(np.int64)
        start = np.maximum(stop - window, 0) if window is not None else np.zeros_like(stop)
        first_block = start // self.block_size
        num_blocks = -(-stop // self.block_size) - first_block
        groups = []
        order = np.argsort(num_blocks, kind="stable")
        for rows in _split_by_length(order, num_blocks[order], GROUP_TOKENS // self.block_size):
            widest = int(num_blocks[rows].max())
            column = first_block[rows, None] + np.minimum(
                np.arange(widest), num_blocks[rows, None] - 1
            )
            keys = first_block[rows, None] * self.block_size + np.arange(widest * self.block_size)
            mask = (keys >= start[rows, None]) & (keys < stop[rows, None])
            groups.append(
                DecodeGroup(
                    torch.from_numpy(rows),
                    self._cache_rows(self.block_table[rows[:, None], column]),
                    widest * self.block_size,
                    torch.from_numpy(mask)[:, None, None, :],
                )
            )
        return groups

    def _chunk(self, row: int, window: int | None) -> Chunk:
        start, stop = int(self.query_start_loc[row]), int(self.query_start_loc[row + 1])
        length = int(self.seq_lens[row])
        context = length - (stop - start)
        first = 0 if window is None else max(context + 1 - window, 0)
        first_block = first // self.block_size if context else 0
        origin = first_block * self.block_size
        cache_rows = None
        if context:
            last_block = -(-length // self.block_size)
            cache_rows = self._cache_rows(self.block_table[row, first_block:last_block])
        tiles = []
        for tile in range(start, stop, QUERY_TILE):
            end = min(tile + QUERY_TILE, stop)
            position = torch.arange(tile, end) - start + context
            low = 0 if window is None else max(int(position[0]) + 1 - window, 0)
            key = torch.arange(max(low, origin), context + end - start)
            mask = key <= position[:, None]
            if window is not None:
                mask &= key > position[:, None] - window
            tiles.append(
                QueryTile(tile, end, int(key[0]) - origin, context + end - start - origin, mask)
            )
        return Chunk(start, stop, cache_rows, tiles)


def _split_by_length(
    order: NDArray[np.int64], lengths: NDArray[np.int64], most: int
) -> list[NDArray[np.int64]]:
    """Cut rows sorted by length where padding would more than double a group's shortest row, or
    where its padded size would pass `most` blocks (a single row may)."""
    groups = []
    begin = 0
    while begin < len(order):
        end = int(np.searchsorted(lengths, 2 * lengths[begin], side="right"))
        padded = lengths[begin:end] * np.arange(1, end - begin + 1)
        end = begin + max(1, int(np.searchsorted(padded, most, side="right")))
        groups.append(order[begin:end])
        begin = end
    return groups


def attend_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query `[T, num_heads, head_dim]`, key and value `[T, num_kv_heads, head_dim]` → like query.

    The caches are one layer's `[num_blocks, num_kv_heads, block_size, head_dim]`, contiguous.
    """
    plan = metadata.cpu_plan
    assert plan is not None
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    for cache, new in ((key_cache, key), (value_cache, value)):
        cache.view(-1, head_dim).index_copy_(0, plan.write_rows, new.reshape(-1, head_dim))
    key_rows = key_cache.view(-1, block_size * head_dim)
    value_rows = value_cache.view(-1, block_size * head_dim)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    decodes, chunks = plan.windows[window]
    for rows, cache_rows, num_keys, mask in decodes:
        shape = (rows.shape[0], num_kv_heads, num_keys, head_dim)
        keys = plan.scratch.gather(0, key_rows, cache_rows).view(shape)
        values = plan.scratch.gather(1, value_rows, cache_rows).view(shape)
        attended = _attend(query[rows].unsqueeze(2), keys, values, mask, scale, softcap, sinks)
        output[rows] = attended.squeeze(2)
    for start, stop, chunk_rows, tiles in chunks:
        if chunk_rows is None:
            keys, values = (new[start:stop].transpose(0, 1)[None] for new in (key, value))
        else:
            shape = (1, num_kv_heads, -1, head_dim)
            keys = plan.scratch.gather(0, key_rows, chunk_rows).view(shape)
            values = plan.scratch.gather(1, value_rows, chunk_rows).view(shape)
        for tile in tiles:
            visible = slice(tile.key_start, tile.key_stop)
            attended = _attend(
                query[tile.start : tile.stop].transpose(0, 1)[None],
                keys[:, :, visible],
                values[:, :, visible],
                tile.mask,
                scale,
                softcap,
                sinks,
            )
            output[tile.start : tile.stop] = attended[0].transpose(0, 1)
    return output


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query `[B, H, n, D]`, key and value `[B, H_kv, keys, D]`, mask broadcast to
    `[B, H, n, keys]` → `[B, H, n, D]`. Soft cap c: scores become c * tanh(score / c)."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
    batch, heads, length, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    packed = query.reshape(batch, num_kv_heads, -1, head_dim)  # a group's heads share their keys
    scores = (packed @ key.transpose(-1, -2)).float().view(batch, heads, length, num_keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, heads, 1, 1).expand(batch, heads, length, 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(-1)[..., :num_keys].to(value.dtype)
    packed_weights = weights.reshape(batch, num_kv_heads, -1, num_keys)
    return (packed_weights @ value).view(batch, heads, length, head_dim)
