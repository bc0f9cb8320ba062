"""The policies fcfs and priority: sequences wait in the order of their rank."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush

from ..request import Request
from ..sequence import Rank, Sequence

SECONDS_PER_PRIORITY = 60
"""Waiting for this long counts like a priority that is lower by one, so that no request waits for
ever while others of a better priority keep coming."""


class RankedQueue:
    """A heap by rank. Removal is lazy, so that an abort costs O(1)."""

    def __init__(self, *, by_priority: bool = False) -> None:
        self._by_priority = by_priority
        self._heap: list[tuple[Rank, Sequence]] = []
        self._members: dict[int, Sequence] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self._members

    def priority_of(self, request: Request) -> int:
        """Return a number that is lower for a lower priority and for an earlier arrival: a waiting
        request goes before those that come so many seconds later as its priority is worse by."""
        if not self._by_priority:
            return 0
        return request.priority * SECONDS_PER_PRIORITY + int(request.arrival_time)

    def push(self, sequence: Sequence) -> None:
        self._members[sequence.seq_id] = sequence
        self.num_tokens += sequence.num_expected_tokens
        heappush(self._heap, (sequence.rank, sequence))

    def put_back(self, sequence: Sequence) -> None:
        self.push(sequence)

    def peek(self) -> Sequence:
        while self._heap[0][1].seq_id not in self._members:
            heappop(self._heap)
        return self._heap[0][1]

    def pop(self) -> Sequence:
        sequence = self.peek()
        heappop(self._heap)
        del self._members[sequence.seq_id]
        self.num_tokens -= sequence.num_expected_tokens
        return sequence

    def remove(self, sequence: Sequence) -> None:
        del self._members[sequence.seq_id]
        self.num_tokens -= sequence.num_expected_tokens
        if len(self._heap) > 64 + 2 * len(self._members):  # most entries are dead
            self._heap = [item for item in self._heap if item[1].seq_id in self._members]
            heapify(self._heap)

    def charge_prompt(self, sequence: Sequence) -> None:
        """Ranks do not depend on service."""

    def charge_outputs(
        self, sequences: Iterable[Sequence], token_ids: Iterable[int | None]
    ) -> None:
        """Ranks do not depend on service."""

    def rerank(self, running: list[Sequence]) -> None:
        """Ranks do not change."""
