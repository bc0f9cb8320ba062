"""Sequences that wait for blocks, in the order of the scheduling policy."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from ..sequence import Rank, Sequence


class WaitingQueue:
    """A heap by rank; removal is lazy, so that an abort costs O(1)."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Sequence]] = []
        self._members: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self._members

    def push(self, sequence: Sequence) -> None:
        self._members[sequence.seq_id] = sequence
        heappush(self._heap, (sequence.rank, sequence))

    def peek(self) -> Sequence:
        """The first in order; the queue must not be empty."""
        while self._heap[0][1].seq_id not in self._members:
            heappop(self._heap)
        return self._heap[0][1]

    def pop(self) -> Sequence:
        sequence = self.peek()
        heappop(self._heap)
        del self._members[sequence.seq_id]
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is in the queue."""
        del self._members[sequence.seq_id]
        if len(self._heap) > 64 + 2 * len(self._members):  # mostly dead entries
            self._heap = [item for item in self._heap if item[1].seq_id in self._members]
            heapify(self._heap)
