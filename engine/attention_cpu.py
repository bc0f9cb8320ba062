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

MIN_QUERY_TILE, MAX_QUERY_TILE = 64, 256
GROUP_BYTES = 2 << 20
"""Of K gathered at once, as much of V: both are read again while the core still caches them."""
_MASKED = float("-inf")


class DecodeGroup(NamedTuple):
    """Sequences with one new token, gathered together and padded to the longest.

    rows of the batch, a slice where they follow each other; cache_rows as `Scratch.gather` wants
    them; keys [key_start, key_stop) of the num_keys gathered are attended to; mask
    `[g, 1, 1, keys]` is added to the scores, None where every row sees all of them.
    """

    rows: torch.Tensor | slice
    cache_rows: torch.Tensor
    num_keys: int
    key_start: int
    key_stop: int
    mask: torch.Tensor | None


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
    """Memory that outlives a step, since fresh pages each time would cost more than what is
    written to them. Grows to the largest need seen."""

    def __init__(self) -> None:
        self._gathered: torch.Tensor | None = None
        self._masks: dict[int | None, torch.Tensor] = {}

    def gather(self, cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Copy `cache[rows]` of a 2-D cache; valid until the next gather."""
        numel = rows.shape[0] * cache.shape[1]
        if self._gathered is None or self._gathered.numel() < numel:
            self._gathered = cache.new_empty(numel)
        out = self._gathered[:numel].view(rows.shape[0], cache.shape[1])
        return torch.index_select(cache, 0, rows, out=out)

    def causal_mask(
        self, num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """`[num_queries, num_keys]` to add to scores: query i is the key at place
        num_keys - num_queries + i, and sees itself and the window - 1 before it.

        Whether a query sees a key depends on their distance alone, so that every mask is a part
        of one matrix.
        """
        known = self._masks.get(window)
        if known is None or known.shape[1] - MAX_QUERY_TILE < num_keys - num_queries:
            width = MAX_QUERY_TILE + max(2 * (num_keys - num_queries), MAX_QUERY_TILE)
            position = torch.arange(width - MAX_QUERY_TILE, width)[:, None]
            key = torch.arange(width)
            hidden = key > position
            if window is not None:
                hidden |= key <= position - window
            known = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, _MASKED)
            self._masks[window] = known
        stop = known.shape[1] - MAX_QUERY_TILE + num_queries
        return known[:num_queries, stop - num_keys : stop]


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """windows: a plan for each distinct window of the model. write_rows
    `[2 * T * num_kv_heads]`: where this step's K, then its V, go in a layer's cache seen as
    `[2 * num_blocks * num_kv_heads * block_size, head_dim]`.
    """

    windows: dict[int | None, WindowPlan]
    write_rows: torch.Tensor
    scratch: Scratch


def build_cpu_plan(
    *,
    kv_cache: torch.Tensor,
    slot_mapping: NDArray[np.int64],
    block_table: NDArray[np.int32],
    query_start_loc: NDArray[np.int32],
    seq_lens: NDArray[np.int32],
    num_decodes: int,
    windows: frozenset[int | None],
    scratch: Scratch,
) -> CpuPlan:
    """Shapes as in AttentionMetadata, on the host."""
    _, _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    blocks, offsets = np.divmod(slot_mapping, block_size)
    write_rows = (blocks[:, None] * num_kv_heads + np.arange(num_kv_heads)) * block_size
    write_rows = (write_rows + offsets[:, None]).reshape(-1)
    write_rows = np.concatenate((write_rows, write_rows + num_blocks * num_kv_heads * block_size))
    layout = _Layout(kv_cache, block_table, query_start_loc, seq_lens, num_decodes, scratch)
    return CpuPlan(
        {window: layout.plan(window) for window in windows}, torch.from_numpy(write_rows), scratch
    )


class _Layout(NamedTuple):
    kv_cache: torch.Tensor
    block_table: NDArray[np.int32]
    query_start_loc: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    num_decodes: int
    scratch: Scratch

    @property
    def block_size(self) -> int:
        return self.kv_cache.shape[4]

    def plan(self, window: int | None) -> WindowPlan:
        return WindowPlan(
            self._decodes(window),
            [self._chunk(row, window) for row in range(self.num_decodes, len(self.seq_lens))],
        )

    def _cache_rows(self, blocks: NDArray[np.int32]) -> torch.Tensor:
        """Block ids `[..., n]` → rows `[2, ..., num_kv_heads, n]`, flat: those of K, then of V,
        in a layer's cache seen as `[2 * num_blocks * num_kv_heads, block_size * head_dim]`."""
        num_blocks, num_kv_heads = self.kv_cache.shape[2:4]
        heads = np.arange(num_kv_heads)[:, None]
        keys = (blocks[..., None, :].astype(np.int64) * num_kv_heads + heads).reshape(-1)
        return torch.from_numpy(np.concatenate((keys, keys + num_blocks * num_kv_heads)))

    def _decodes(self, window: int | None) -> list[DecodeGroup]:
        if self.num_decodes == 0:
            return []
        stop = self.seq_lens[: self.num_decodes].astype(np.int64)
        start = np.maximum(stop - window, 0) if window is not None else np.zeros_like(stop)
        first_block = start // self.block_size
        num_blocks = -(-stop // self.block_size) - first_block
        block_bytes = self.kv_cache[0, 0, 0].nbytes
        order = np.argsort(num_blocks, kind="stable")
        groups = []
        for rows in _split_by_length(order, num_blocks[order], GROUP_BYTES // block_bytes):
            widest = int(num_blocks[rows].max())
            column = first_block[rows, None] + np.minimum(
                np.arange(widest), num_blocks[rows, None] - 1
            )
            origin = first_block[rows] * self.block_size
            begin, end = start[rows] - origin, stop[rows] - origin
            low, high = int(begin.min()), int(end.max())
            groups.append(
                DecodeGroup(
                    _as_index(rows),
                    self._cache_rows(self.block_table[rows[:, None], column]),
                    widest * self.block_size,
                    low,
                    high,
                    self._decode_mask(begin - low, end - low, high - low),
                )
            )
        return groups

    def _decode_mask(
        self, begin: NDArray[np.int64], end: NDArray[np.int64], num_keys: int
    ) -> torch.Tensor | None:
        if begin.max() == 0 and end.min() == num_keys:
            return None
        key = np.arange(num_keys)
        hidden = torch.from_numpy((key < begin[:, None]) | (key >= end[:, None]))
        mask = torch.zeros(hidden.shape, dtype=self.kv_cache.dtype)
        return mask.masked_fill_(hidden, _MASKED)[:, None, None, :]

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
        tile = start
        while tile < stop:
            position = tile - start + context
            # Half of a tile's own square is computed in vain, which counts where little is before.
            size = min(max(position // 4, MIN_QUERY_TILE), MAX_QUERY_TILE, stop - tile)
            low = origin if window is None else max(position + 1 - window, origin)
            high = position + size
            mask = self.scratch.causal_mask(size, high - low, window, self.kv_cache.dtype)
            tiles.append(QueryTile(tile, tile + size, low - origin, high - origin, mask))
            tile += size
        return Chunk(start, stop, cache_rows, tiles)


def _as_index(rows: NDArray[np.int64]) -> torch.Tensor | slice:
    first = int(rows[0])
    if np.array_equal(rows, np.arange(first, first + len(rows))):
        return slice(first, first + len(rows))
    return torch.from_numpy(rows)


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
    plan = metadata.cpu_plan
    assert plan is not None
    _, _, num_kv_heads, block_size, head_dim = cache.shape
    new = torch.stack((key, value)).view(-1, head_dim)
    cache.view(-1, head_dim).index_copy_(0, plan.write_rows, new)
    cache = cache.view(-1, block_size * head_dim)
    decodes, chunks = plan.windows[window]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for rows, cache_rows, num_keys, key_start, key_stop, mask in decodes:
        gathered = plan.scratch.gather(cache, cache_rows)
        keys, values = gathered.view(2, -1, num_kv_heads, num_keys, head_dim)[
            :, :, :, key_start:key_stop
        ]
        attended = _attend(query[rows].unsqueeze(2), keys, values, mask, scale, softcap, sinks)
        if rows == slice(0, len(query)):  # all there is, and in order
            return attended.squeeze(2)
        output[rows] = attended.squeeze(2)
    for start, stop, chunk_rows, tiles in chunks:
        if chunk_rows is None:
            keys, values = (new[start:stop].transpose(0, 1)[None] for new in (key, value))
        else:
            gathered = plan.scratch.gather(cache, chunk_rows)
            keys, values = gathered.view(2, 1, num_kv_heads, -1, head_dim)
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
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query `[B, H, n, D]`, key and value `[B, H_kv, keys, D]`, mask broadcast to
    `[B, H, n, keys]` → `[B, H, n, D]`. Soft cap c: scores become c * tanh(score / c)."""
    # In 16 bits, torch's fused attention of one query takes ten times as long as in 32.
    is_slow = query.shape[2] == 1 and query.dtype != torch.float32
    if softcap is None and sinks is None and not is_slow:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
    batch, heads, length, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    packed = query.reshape(batch, num_kv_heads, -1, head_dim)  # a group's heads share their keys
    scores = (packed @ key.transpose(-1, -2)).float().view(batch, heads, length, num_keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        sink = sinks.float().view(1, heads, 1, 1).expand(batch, heads, length, 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(-1)[..., :num_keys].to(value.dtype)
    packed_weights = weights.reshape(batch, num_kv_heads, -1, num_keys)
    return (packed_weights @ value).view(batch, heads, length, head_dim)
