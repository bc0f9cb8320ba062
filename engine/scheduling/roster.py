"""The running sequences, and what the worker must be told about who runs."""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from ..sequence import Sequence, SequenceStatus
from ..step import SequenceSpec
from .adapter_table import AdapterTable

_rank = attrgetter("rank")


class Roster:
    """Owns the list of running sequences, which is sorted by rank.

    So the sequence to preempt is always the last one, and never one that the step being scheduled
    already has a row for. The worker keeps a row for each sequence that it knows: it is introduced
    to a sequence with that sequence's first row, and told when to forget it.
    """

    def __init__(self, adapters: AdapterTable | None = None) -> None:
        self.adapters = adapters or AdapterTable()
        self.running: list[Sequence] = []
        """Sorted by rank. Others read it; only this class and a policy's `rerank` change it."""
        self.num_reading = 0
        """Running sequences whose tokens the host must know before the next is sampled."""
        self._unknown: set[int] = set()
        self._released: list[int] = []
        self._last_rows: tuple[list[Sequence], list[int]] = ([], [])

    def add(self, sequence: Sequence) -> None:
        """Let the sequence run, at the place that its rank gives it."""
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=_rank)
        self.num_reading += sequence.reads_tokens
        if sequence.adapter_id is not None:
            self.adapters.start(sequence)
        self._unknown.add(sequence.seq_id)

    def remove(self, sequence: Sequence, status: SequenceStatus) -> None:
        """Take a running sequence out; it waits or has finished from now on."""
        running = self.running
        if running[-1] is sequence:
            running.pop()
        else:
            running.remove(sequence)
        sequence.status = status
        self.num_reading -= sequence.reads_tokens
        if sequence.adapter_id is not None:
            self.adapters.stop(sequence)
        if sequence.seq_id in self._unknown:
            self._unknown.remove(sequence.seq_id)
        else:
            self._released.append(sequence.seq_id)

    def knows(self, sequence: Sequence) -> bool:
        """Return whether the worker was introduced to this running sequence."""
        return sequence.seq_id not in self._unknown

    def seq_ids(self, rows: list[Sequence]) -> list[int]:
        """Return the seq_ids of a step's rows, which are most often those of the step before."""
        last_rows, seq_ids = self._last_rows
        if rows != last_rows:  # sequences compare by identity: this is a scan of pointers
            seq_ids = [sequence.seq_id for sequence in rows]
            self._last_rows = rows, seq_ids
        return seq_ids

    def introduce(self, rows: list[Sequence]) -> list[SequenceSpec]:
        """Return the specs of those rows that the worker does not know; now it does."""
        if not self._unknown:
            return []
        specs = [sequence.spec() for sequence in rows if sequence.seq_id in self._unknown]
        self._unknown.difference_update(spec.seq_id for spec in specs)
        return specs

    def take_released(self) -> list[int]:
        """Return the seq_ids that the worker may forget since this was last called."""
        released, self._released = self._released, []
        return released
