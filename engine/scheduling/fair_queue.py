"""The policy fair: the least served API key goes first, and of its users the least served one.

A key's users share its turns: a FairQueue of keys has, for each key, a FairQueue of users.

This is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al.,
OSDI 2024, algorithm 2). A user's counter is the service that they got, in weighted tokens.
Admission takes from the waiting user with the lowest counter, in order of arrival. A user who
starts to wait is lifted to the lowest counter of those who wait already, so that nobody banks
credit by being away. While two users both wait, the service they get differs by no more than a
constant, and no seat or block is kept free while anyone waits.

Two things differ from the paper: prompt tokens found in the prefix cache cost nothing, and neither
does recomputing after a preemption. If blocks run out, the most served user's latest sequence is
preempted (see `rerank`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import count
from operator import attrgetter

from ..request import Request
from ..sequence import Rank, Sequence, SequenceStatus
from .ranked_queue import RankedQueue

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""Service of a computed prompt token and of a generated one, as in the paper."""

MAX_USERS = 16_384
"""Maximum number of counters. Beyond it, the users who have been away longest are forgotten."""


@dataclass(slots=True, eq=False)
class _Account:
    """One user's counter and waiting sequences."""

    number: int
    """Breaks ties between users of equal service."""
    waiting: RankedQueue | FairQueue
    service: int = 0
    is_entered: bool = False
    """Whether it has an entry in the heap of users."""


def _key_of(request: Request) -> str | None:
    """Return the API key of a request's user, who is written as KEY:LABEL."""
    return request.user and request.user.partition(":")[0]


def _user_of(request: Request) -> str | None:
    return request.user


class FairQueue:
    """A queue for each user, and a heap of the users who have one.

    By default the users are API keys, each of whose queues is again fair to the users in it.

    Counters only grow, so an outdated entry of the heap stands too early. It is corrected when it
    reaches the top.
    """

    def __init__(self, *, by_key: bool = True) -> None:
        self._by_key = by_key
        self._user_of = _key_of if by_key else _user_of
        self._accounts: dict[str | None, _Account] = {}
        """By user, in the order in which they last began to wait."""
        self._users: list[tuple[int, int, _Account]] = []
        self._numbers = count()
        self._size = 0
        self.num_tokens = 0
        self._last = self._new_account()
        """The account from which the last sequence was admitted."""

    def __len__(self) -> int:
        return self._size

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._account(sequence).waiting

    def priority_of(self, request: Request) -> int:
        return 0

    def push(self, sequence: Sequence) -> None:
        user = self._user_of(sequence.request)
        account = self._account(sequence)
        if not account.waiting:
            self._accounts[user] = self._accounts.pop(user)
            if sequence.num_preemptions == 0:  # a preempted sequence has not been away
                least = self._least() or self._last
                account.service = max(account.service, least.service)
        self.put_back(sequence)

    def put_back(self, sequence: Sequence) -> None:
        account = self._account(sequence)
        if not account.is_entered:
            account.is_entered = True
            heappush(self._users, (account.service, account.number, account))
        sequence.rank = sequence.rank._replace(priority=0)
        account.waiting.push(sequence)
        self._size += 1
        self.num_tokens += sequence.num_expected_tokens

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
        self.num_tokens -= sequence.num_expected_tokens

    def charge_prompt(self, sequence: Sequence) -> None:
        """Charge a sequence that is admitted for the first time for all of its prompt at once.

        Otherwise its user's next sequence could be admitted before any of it is computed.
        """
        computed = sequence.num_prompt_tokens - (sequence.num_cached_tokens or 0)
        self._last = self._account(sequence)
        self._last.service += PROMPT_WEIGHT * computed
        self._last.waiting.charge_prompt(sequence)

    def charge_outputs(
        self, sequences: Iterable[Sequence], token_ids: Iterable[int | None]
    ) -> None:
        """Charge for the tokens that a step's rows sampled; None stands for rows that did not.

        Rows that have ended since the step was launched get no token, so they are not charged.
        """
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            if token_id is not None and sequence.status is not SequenceStatus.FINISHED:
                self._charge_token(sequence)

    def _charge_token(self, sequence: Sequence) -> None:
        account = self._account(sequence)
        account.service += OUTPUT_WEIGHT
        if isinstance(account.waiting, FairQueue):
            account.waiting._charge_token(sequence)

    def rerank(self, running: list[Sequence]) -> None:
        """Sort the running sequences by their keys' service, then by their users': the last is
        preempted first."""
        for sequence in running:
            _, arrival_order, choice = sequence.rank
            sequence.rank = Rank(self._service_of(sequence), arrival_order, choice)
        running.sort(key=attrgetter("rank"))

    def _service_of(self, sequence: Sequence) -> int:
        account = self._account(sequence)
        if isinstance(account.waiting, FairQueue):
            return (account.service << 64) + account.waiting._service_of(sequence)
        return account.service

    def _account(self, sequence: Sequence) -> _Account:
        user = self._user_of(sequence.request)
        account = self._accounts.get(user)
        if account is None:
            if len(self._accounts) >= MAX_USERS:
                self._forget()
            account = self._accounts[user] = self._new_account()
        return account

    def _new_account(self) -> _Account:
        waiting = FairQueue(by_key=False) if self._by_key else RankedQueue()
        return _Account(next(self._numbers), waiting)

    def _forget(self) -> None:
        for user, account in self._accounts.items():
            if not account.waiting:
                del self._accounts[user]
                return

    def _least(self) -> _Account | None:
        """Return the least served of the users who wait; None if nobody does."""
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
