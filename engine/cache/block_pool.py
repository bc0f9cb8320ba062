"""The KV blocks of the device: reference counts and the order in which free ones are reused."""

from __future__ import annotations

from collections import OrderedDict

from .evicted_blocks import EvictedBlocks
from .prefix_index import PrefixIndex

MAX_STATE = 255
"""The largest state of a block in `BlockPool.states`."""

_PLUS_ONE = bytes([0, *range(2, MAX_STATE + 1), MAX_STATE])
"""The state of a used block by its number of references; 0 stays 0."""


class BlockTrace:
    """What has become of blocks while somebody watches, as sets of block ids."""

    __slots__ = ("copied", "evicted")

    def __init__(self) -> None:
        self.copied: set[int] = set()
        """Blocks that were made by copying another one."""
        self.evicted: set[int] = set()
        """Cached blocks that were handed out again, so that their content is lost."""


class BlockPool:
    """Hands out blocks, counts the references to them, and takes them back. Each call is O(1).

    A block with reference count 0 is free. If the index knows its content, the content may still be
    found and shared, so the block is kept: kept blocks are reused only when there are no others,
    the least recently released first.

        allocate ◀── plain (a stack) ◀── then ── cached (least recently released first)
                          ▲ not indexed                ▲ indexed
                          └──────── release ───────────┘
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.index = PrefixIndex()
        self.ref_counts = [0] * num_blocks
        self._plain = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self.trace: BlockTrace | None = None
        """Filled while somebody watches, otherwise None."""
        self.evicted_blocks: EvictedBlocks | None = None
        """Where the content of blocks goes before they are reused, if anywhere."""

    @property
    def num_free(self) -> int:
        """Number of blocks that `allocate` can hand out."""
        return len(self._plain) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Number of free blocks that can still be found by their content."""
        return len(self._cached)

    def allocate(self) -> int | None:
        """Return a block with reference count 1 and no entry in the index; None if none is free."""
        if self._plain:
            block = self._plain.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            if self.evicted_blocks is not None:
                self.evicted_blocks.take(block, self.index.hash_of(block))
            self.index.forget(block)
            if self.trace is not None:
                self.trace.evicted.add(block)
        else:
            return None
        self.ref_counts[block] = 1
        return block

    def lookup(self, own_hash: bytes) -> int | None:
        """Return the block with this content; see `PrefixIndex.lookup`."""
        return self.index.lookup(own_hash)

    def share(self, block: int) -> None:
        """Add a reference to a block in use, or to a free one that the index still knows."""
        if self.ref_counts[block] == 0:
            del self._cached[block]
        self.ref_counts[block] += 1

    def release(self, block: int) -> None:
        """Drop one reference. Dropping the last one makes the block free."""
        count = self.ref_counts[block] - 1
        assert count >= 0, f"block {block} was released more often than taken"
        self.ref_counts[block] = count
        if count == 0:
            if block in self.index:
                self._cached[block] = None
            else:
                self._plain.append(block)

    def forget(self, block: int) -> None:
        """Remove the block's content from the index, whether the block is used or free."""
        self.index.forget(block)
        if self._cached.pop(block, 0) is None:
            self._plain.append(block)

    def forget_free(self) -> None:
        """Remove from the index all content that no sequence holds."""
        for block in list(self._cached):
            self.forget(block)
        if self.index.recorder is not None and not self.index.hashes():
            self.index.recorder.cleared()

    def restart_trace(self) -> BlockTrace:
        """Return what was traced since the last call, and trace from now on."""
        trace, self.trace = self.trace, BlockTrace()
        return trace or BlockTrace()

    def states(self) -> bytes:
        """Return one byte for each block: 0 if it is free, 1 if it is free and the index knows its
        content, and n + 1 (at most MAX_STATE) if it has n references.

        The counts are moved by `bytes.translate`, because a loop over all blocks would be slow.
        """
        try:
            counts = bytes(self.ref_counts)
        except ValueError:  # a count that no byte can hold
            counts = bytes([min(count, MAX_STATE) for count in self.ref_counts])
        states = bytearray(counts.translate(_PLUS_ONE))
        for block in self._cached:
            states[block] = 1
        return bytes(states)

    def check_integrity(self, expected_ref_counts: list[int]) -> None:
        """Assert that counts, free lists and index agree."""
        assert self.ref_counts == expected_ref_counts, [
            (block, have, want)
            for block, (have, want) in enumerate(
                zip(self.ref_counts, expected_ref_counts, strict=True)
            )
            if have != want
        ]
        free = [*self._plain, *self._cached]
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free) == {b for b, count in enumerate(self.ref_counts) if count == 0}
        assert not any(block in self.index for block in self._plain), "indexed but not findable"
        assert all(block in self.index for block in self._cached), "kept without an entry"
        self.index.check_integrity()
