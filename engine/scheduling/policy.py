"""What a scheduling policy decides: who is admitted next, and who is preempted first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ..config import SchedulingPolicy
from ..request import Request
from ..sequence import Sequence
from .fair_queue import FairQueue
from .ranked_queue import RankedQueue


class Policy(Protocol):
    """The queue of waiting sequences, in the order in which they will be admitted.

    A policy may also count what sequences get and rank the running ones by it; a policy that does
    not leaves those methods empty.
    """

    def __len__(self) -> int:
        """Return the number of waiting sequences."""

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all waiting sequences, without those that are expected to be cached."""

    def __contains__(self, sequence: Sequence) -> bool:
        """Return whether the sequence waits here."""

    def priority_of(self, request: Request) -> int:
        """Return the priority for the ranks of a request's sequences; lower goes first."""

    def push(self, sequence: Sequence) -> None:
        """Let the sequence wait, at the place that its rank gives it."""

    def put_back(self, sequence: Sequence) -> None:
        """Let a sequence wait again that `pop` returned and that could not be admitted. It loses
        nothing by that."""

    def peek(self) -> Sequence:
        """Return the sequence to admit next. The queue must not be empty."""

    def pop(self) -> Sequence:
        """Remove and return the sequence to admit next. The queue must not be empty."""

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that waits here."""

    def charge_prompt(self, sequence: Sequence) -> None:
        """Count the prompt of a sequence that is admitted for the first time."""

    def charge_outputs(
        self, sequences: Iterable[Sequence], token_ids: Iterable[int | None]
    ) -> None:
        """Count the tokens that a step's rows sampled; None stands for rows that did not."""

    def rerank(self, running: list[Sequence]) -> None:
        """Give the running sequences new ranks and sort them, before any is preempted."""


def make_policy(name: SchedulingPolicy) -> Policy:
    """Return the policy that a configuration names."""
    return FairQueue() if name == "fair" else RankedQueue(by_priority=name == "priority")
