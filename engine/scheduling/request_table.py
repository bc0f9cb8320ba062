"""The unfinished requests: their sequences and their deadlines."""

from __future__ import annotations

import random
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from ..errors import InvalidRequestError, QueueTimeoutError, RequestTimeoutError
from ..outputs import RowError
from ..request import Request
from ..sequence import Rank, Sequence


class _Deadline(NamedTuple):
    time: float
    arrival_order: int
    request_id: str
    queued: bool
    """Whether it bounds the wait for the first step only."""


class RequestTable:
    """Makes a request's sequences and finds them again. It takes no part in scheduling."""

    def __init__(self, eos_token_ids: tuple[int, ...], seed: int | None) -> None:
        """`seed` makes the seeds of requests without one repeat from start to start."""
        self._random = random.Random(seed)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._sequences: dict[str, list[Sequence]] = {}
        self._deadlines: list[_Deadline] = []
        self._arrivals = count()

    def add(self, request: Request, priority: int) -> list[Sequence]:
        """Make the sequences of the request's open choices (as many as its width for a beam
        search), in order of choice, with `priority` in their ranks."""
        if request.request_id in self._sequences:
            raise InvalidRequestError("a request with this id is running", "request_id")
        params = request.sampling_params
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        stop_ids = frozenset(params.stop_token_ids)
        # The end of a grammar ends the answer, so ignore_eos has no say in it.
        if not params.ignore_eos or request.grammar is not None:
            stop_ids |= self._eos_token_ids
        order = next(self._arrivals)
        sequences = [
            Sequence(request, choice, _wrap(seed + choice), Rank(priority, order, choice), stop_ids)
            for choice in (range(params.beam_width) if params.beam_width else request.open_choices)
        ]
        self._sequences[request.request_id] = list(sequences)
        for time, queued in ((request.queue_deadline, True), (request.deadline, False)):
            if time is not None:
                heappush(self._deadlines, _Deadline(time, order, request.request_id, queued))
        return sequences

    def find(self, request_id: str) -> list[Sequence]:
        """Return a request's unfinished sequences in order of choice; none if it is unknown."""
        return list(self._sequences.get(request_id, ()))

    def unfinished(self) -> Iterator[Sequence]:
        """Yield all unfinished sequences, in the order of their arrival."""
        return (one for sequences in self._sequences.values() for one in sequences)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        request_id = sequence.request.request_id
        siblings = self._sequences[request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[request_id]

    def expired(self, now: float) -> Iterator[tuple[Sequence, RowError]]:
        """Yield the sequences whose deadline has passed; each deadline is reported once."""
        while self._deadlines and self._deadlines[0].time <= now:
            deadline = heappop(self._deadlines)
            sequences = self.find(deadline.request_id)
            if not sequences or sequences[0].rank.arrival_order != deadline.arrival_order:
                continue  # the request has ended, and its id may be in use again
            if not deadline.queued:
                error = RowError(RequestTimeoutError.code, "the request's time limit passed")
            elif all(sequence.scheduled_time is None for sequence in sequences):
                error = RowError(QueueTimeoutError.code, "the time limit for waiting passed")
            else:
                continue
            for sequence in sequences:
                yield sequence, error


def _wrap(seed: int) -> int:
    """Wrap a seed into the signed 64-bit range."""
    return (seed + 2**63) % 2**64 - 2**63
