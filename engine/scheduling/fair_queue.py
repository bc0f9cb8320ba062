"""Fair queueing between users: whoever has been served least goes first.

The virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024,
algorithm 2). A user's counter is the service that they got, in weighted tokens. Of the users that
wait, the one with the lowest counter is admitted from, in order of arrival. Who starts to wait is
lifted to the lowest counter of those who do, so that nobody banks credit by being away. While two
users both wait, what they get differs by no more than a constant, and no seat or block is kept
free while anyone waits.

What differs from the paper: prompt tokens found in the prefix cache cost nothing, and neither does
recomputing after a preemption. Where blocks run out, it is the most served user's latest sequence
that goes (see `rank`).
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush, heapreplace
from itertools import count
from operator import attrgetter

from ..sequence import Rank, Sequence, SequenceStatus
from .waiting_queue import WaitingQueue

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""Service of a computed prompt token and of a generated one, as in the paper."""

MAX_USERS = 16_384
"""Most counters that are kept; then those are forgotten whose users were away longest."""


class _Account:
    """One user's counter and waiting sequences."""

    __slots__ = ("is_entered", "number", "service", "waiting")

    def __init__(self, number: int) -> None:
        self.number = number
        self.service = 0
        self.waiting = WaitingQueue()
        self.is_entered = False
        """It stands in the heap of users."""


class FairQueue(WaitingQueue):
    """A queue for each user, and a heap of the users that have one.

    Counters only grow, so an entry of the heap that is out of date stands too early, and is put
    right when it comes up.
    """

    def __init__(self) -> None:
        self._accounts: dict[str | None, _Account] = {}
        """Those that came last stand last."""
        self._users: list[tuple[int, int, _Account]] = []
        self._numbers = count()
        self._size = 0
        self._last = _Account(next(self._numbers))
        """The account that was admitted from last."""

    def __len__(self) -> int:
        return self._size

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._account(sequence).waiting

    def push(self, sequence: Sequence) -> None:
        user = sequence.request.user
        account = self._account(sequence)
        if not account.waiting:
            self._accounts[user] = self._accounts.pop(user)
            if sequence.num_preemptions == 0:  # else it has not been away
                least = self._least() or self._last
                account.service = max(account.service, least.service)
            if not account.is_entered:
                account.is_entered = True
                heappush(self._users, (account.service, account.number, account))
        sequence.rank = sequence.rank._replace(priority=0)
        account.waiting.push(sequence)
        self._size += 1

    def peek(self) -> Sequence:
        least = self._least()
        assert least is not None
        return least.waiting.peek()

    def pop(self) -> Sequence:
        sequence = self.peek()
        self.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        self._account(sequence).waiting.remove(sequence)
        self._size -= 1

    def charge_prompt(self, sequence: Sequence) -> None:
        """For a sequence that is admitted for the first time: all at once, lest its user's next
        one be admitted before any of it is computed."""
        computed = sequence.num_prompt_tokens - (sequence.num_cached_tokens or 0)
        self._last = self._account(sequence)
        self._last.service += PROMPT_WEIGHT * computed

    def charge_outputs(
        self, sequences: Iterable[Sequence], token_ids: Iterable[int | None]
    ) -> None:
        """For the tokens that a step's rows generated; None for rows that did not. Rows that have
        ended since the step was launched get none."""
        accounts = self._accounts
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            if token_id is not None and sequence.status is not SequenceStatus.FINISHED:
                account = accounts.get(sequence.request.user) or self._account(sequence)
                account.service += OUTPUT_WEIGHT

    def rank(self, running: list[Sequence]) -> None:
        """Sort `running` by their users' service, so that the last is whom to preempt."""
        for sequence in running:
            _, arrival_order, choice = sequence.rank
            sequence.rank = Rank(self._account(sequence).service, arrival_order, choice)
        running.sort(key=attrgetter("rank"))

    def service_of(self, user: str | None) -> int:
        account = self._accounts.get(user)
        return 0 if account is None else account.service

    def _account(self, sequence: Sequence) -> _Account:
        account = self._accounts.get(sequence.request.user)
        if account is None:
            if len(self._accounts) >= MAX_USERS:
                self._forget()
            account = _Account(next(self._numbers))
            self._accounts[sequence.request.user] = account
        return account

    def _forget(self) -> None:
        for user, account in self._accounts.items():
            if not account.waiting:
                del self._accounts[user]
                return

    def _least(self) -> _Account | None:
        """The least served of those that wait."""
        heap = self._users
        while heap:
            service, _, account = heap[0]
            if not account.waiting:
                heappop(heap)
                account.is_entered = False
            elif service != account.service:
                heapreplace(heap, (account.service, account.number, account))
            else:
                return account
        return None
