"""The KV blocks of the device: reference counts and the order in which free ones are reused."""

from __future__ import annotations

from collections import OrderedDict

from .prefix_index import PrefixIndex


class BlockPool:
    """Every operation is O(1).

    A block with reference count 0 is free. If the index knows its content it may still be found
    and shared again, so it is reused last, least recently released first; a block without
    content worth keeping is reused at once.

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

    @property
    def num_free(self) -> int:
        return len(self._plain) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks that may still be found by their content."""
        return len(self._cached)

    def allocate(self) -> int | None:
        """A block with reference count 1 and no entry in the index; None if none is free."""
        if self._plain:
            block = self._plain.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self.index.forget(block)
        else:
            return None
        self.ref_counts[block] = 1
        return block

    def lookup(self, own_hash: bytes) -> int | None:
        return self.index.lookup(own_hash)

    def share(self, block: int) -> None:
        """Take one more reference to a used block, or to a free one that the index still knows."""
        if self.ref_counts[block] == 0:
            del self._cached[block]
        self.ref_counts[block] += 1

    def release(self, block: int) -> None:
        """Give one reference back; the last makes the block free."""
        count = self.ref_counts[block] - 1
        assert count >= 0, f"block {block} was released more often than taken"
        self.ref_counts[block] = count
        if count == 0:
            if block in self.index:
                self._cached[block] = None
            else:
                self._plain.append(block)

    def forget(self, block: int) -> None:
        """Make the block's content unfindable, whether it is used or free."""
        self.index.forget(block)
        if self._cached.pop(block, 0) is None:
            self._plain.append(block)

    def forget_free(self) -> None:
        """Drop all cached content that no sequence holds."""
        for block in list(self._cached):
            self.forget(block)

    def check_integrity(self, expected_ref_counts: list[int]) -> None:
        """Prove counts, free lists and index against each other; AssertionError says where."""
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
