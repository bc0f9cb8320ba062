"""The queue limits: how much may wait. Requests are charged on arrival, before tokenisation."""

from __future__ import annotations

from types import TracebackType

from ...engine.client import EngineClient
from ...engine.errors import QueueFullError, ShuttingDownError
from ..settings import Settings
from ..tenants.caller import Caller, Charge, present_caller

LOAD_FIELDS = 3
"""Counters per process: queued, running, queued tokens."""
CHARACTERS_PER_TOKEN = 4
"""Estimate that a prompt is charged by until it is tokenised and its length is known."""


def no_loads(processes: int) -> memoryview[int]:
    """Return zeroed counters for `processes` processes."""
    return memoryview(bytearray(processes * LOAD_FIELDS * 8)).cast("q")


class InFlight:
    """Counts sequences from arrival to the first token ("queued") and after it ("running").

    All HTTP workers share the memory `loads`, in which each one writes only the LOAD_FIELDS
    counters at its `index`; the limits apply to the sums. Requests that arrive at two workers at
    the same moment may both take the last place.

    Sequences that the engine can take into the next step do not count as a queue, so up to
    `max_num_queued_reqs` plus the free part of `max_num_seqs` may be queued. The limit on tokens
    always admits one request of each key; otherwise a long prompt could never be served. A queue
    that others have filled still admits the requests of a key that has less than its share of the
    places; so with k keys at most 1 + 1/2 + … + 1/k times as many may wait.
    """

    def __init__(
        self, settings: Settings, engine: EngineClient, index: int, loads: memoryview[int]
    ) -> None:
        self._settings = settings
        engine_seqs = settings.engine_config().max_num_seqs
        self._max_num_seqs = engine_seqs * settings.data_parallel_size
        self._engine = engine
        self.draining = False
        self._loads = loads
        self._own = index * LOAD_FIELDS

    @property
    def num_queued(self) -> int:
        """Sequences of all workers that wait for their first token."""
        return sum(self._loads[0::LOAD_FIELDS])

    @property
    def num_running(self) -> int:
        """Sequences of all workers that have had their first token."""
        return sum(self._loads[1::LOAD_FIELDS])

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of the queued requests of all workers, estimated or counted."""
        return sum(self._loads[2::LOAD_FIELDS])

    def count(self, queued: int, running: int, tokens: int) -> None:
        """Add to the counters of this process; the arguments may be negative."""
        loads, own = self._loads, self._own
        loads[own] += queued
        loads[own + 1] += running
        loads[own + 2] += tokens

    def admit(self, num_sequences: int, num_characters: int, num_tokens: int = 0) -> Ticket:
        """Charge a request for its sequences and for the characters and token ids of its prompts.

        Raises QueueFullError, ShuttingDownError, or RateLimitError if its key has used up its own
        limits, and then charges nothing.
        """
        if self.draining:
            raise ShuttingDownError("the server is shutting down", self._settings.shutdown_timeout)
        tokens = num_tokens + -(-num_characters // CHARACTERS_PER_TOKEN)
        caller = present_caller.get()
        self._check_sequences(num_sequences, caller)
        self._check_tokens(tokens, caller)
        charge = None if caller is None else caller.admit(tokens, num_sequences)
        return Ticket(self, num_sequences, tokens, charge)

    def _check_sequences(self, num_sequences: int, caller: Caller | None) -> None:
        """Raise QueueFullError if too many sequences wait, unless the caller has its share left."""
        settings = self._settings
        limit = settings.max_num_queued_reqs
        if limit is None:
            return
        stats, seats = self._engine.stats(), self._max_num_seqs
        if stats is not None:  # an engine that has started may run fewer
            seats = min(seats, self._engine.info.max_num_seqs * settings.data_parallel_size)
        places = limit + max(0, seats - self.num_running)
        waiting = stats.num_waiting if stats is not None else 0
        idle = not (self.num_queued or self.num_running)
        fits = idle or self.num_queued + num_sequences <= places
        if fits and waiting <= limit:
            return
        if caller is None or not caller.may_wait_beside_others(num_sequences, places):
            raise QueueFullError(
                f"{max(self.num_queued, waiting)} requests are waiting; the limit is {limit}"
            )

    def _check_tokens(self, tokens: int, caller: Caller | None) -> None:
        """Raise QueueFullError if too many prompt tokens wait, unless the caller has none there."""
        limit = self._settings.max_num_queued_tokens
        if limit is None or self.queued_tokens + tokens <= limit:
            return
        if self.num_queued if caller is None else caller.num_waiting:
            raise QueueFullError(
                f"{self.queued_tokens} prompt tokens are waiting; the limit is {limit}"
            )


class Ticket:
    """One request's share of the counters; a context manager that gives it back at exit. `charge`
    is what it costs its key, if that is counted."""

    __slots__ = ("_charge", "_in_flight", "_running", "_sequences", "_tokens")

    def __init__(
        self, in_flight: InFlight, sequences: int, tokens: int, charge: Charge | None = None
    ) -> None:
        self._charge = charge
        self._in_flight = in_flight
        self._sequences = sequences
        self._tokens = tokens
        self._running = False
        in_flight.count(sequences, 0, tokens)

    def tokenised(self, tokens: int) -> None:
        """Replace the estimate by the true number of prompt tokens."""
        if self._charge is not None:
            self._charge.add(tokens - self._tokens)
        self._in_flight.count(0, 0, tokens - self._tokens)
        self._tokens = tokens

    @property
    def key_name(self) -> str:
        """The name of the key that the request came with; empty if it has none."""
        return "" if self._charge is None else self._charge.name

    def generated(self, tokens: int) -> None:
        """Charge the key for output tokens."""
        if self._charge is not None:
            self._charge.add(tokens)

    def started(self) -> None:
        """Count the request as running: its first token has come. Idempotent."""
        if not self._running:
            self._running = True
            if self._charge is not None:
                self._charge.started()
            self._in_flight.count(-self._sequences, self._sequences, -self._tokens)

    def close(self) -> None:
        """Give the share back, and what the key was charged if nothing was computed. Idempotent."""
        if self._charge is not None:
            self._charge.close(computed=self._running)
        self.started()
        self._in_flight.count(0, -self._sequences, 0)
        self._sequences = 0

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
