"""Random steps that a scheduler could plan, with the token ids that each must compute."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch

from quire.engine.devices.steps import DeviceStep, HostStep
from quire.engine.runner.input_batch import InputBatch
from quire.engine.sequence import Sequence
from quire.engine.step import UNKNOWN_TOKEN, SchedulerOutput, SequenceSpec, TableChange

from .worker_driver import make_sequence

MAX_NUM_SEQS, BLOCK_SIZE = 6, 16
BUDGET = 64


class Step(NamedTuple):
    output: SchedulerOutput
    rows: list[Sequence]
    """The sequences of the plan's rows, as they are when it is made."""
    token_ids: list[list[int]]
    """The tokens of each row, with the values of unknown ones."""
    sampled: list[SequenceSpec]
    sampled_ids: torch.Tensor
    """The sequences that the step samples, in any order, and their tokens, without failed rows."""

    def prepare_in(self, batch: InputBatch) -> tuple[HostStep, DeviceStep] | None:
        """Apply and prepare the step; return None if it has no rows."""
        batch.apply(self.output)
        if not self.output.seq_ids:
            return None
        prepared = batch.prepare(self.output)
        batch.keep_samples(self.sampled, self.sampled_ids)
        return prepared


def make_output(
    rows: list[tuple[Sequence, int]],
    new: list[Sequence] | None = None,
    changes: list[TableChange] | None = None,
    released: list[int] | None = None,
) -> SchedulerOutput:
    ends = [sequence.num_computed_tokens + length for sequence, length in rows]
    return SchedulerOutput(
        step=0,
        seq_ids=[sequence.seq_id for sequence, _ in rows],
        num_computed_starts=[sequence.num_computed_tokens for sequence, _ in rows],
        num_new_tokens=[length for _, length in rows],
        token_ids=[
            token
            for (sequence, length), end in zip(rows, ends, strict=True)
            for token in sequence.token_ids[end - length : end]
        ],
        partial_rows=[
            row
            for row, ((sequence, _), end) in enumerate(zip(rows, ends, strict=True))
            if end < len(sequence.token_ids)
        ],
        new_sequences=[sequence.spec() for sequence in new or []],
        block_copies=[],
        table_changes=changes or [],
        released=released or [],
        drafts={},
    )


class RandomSteps:
    """Random arrivals, growth, forks, copies on write, releases and returns.

    There are few rows to spare, and some steps run one step ahead of their tokens. Each of several
    groups of layers has tables of its own, whose columns also change by themselves. `seen` counts
    what happened.
    """

    def __init__(self, seed: int, max_len: int, budget: int = BUDGET, num_groups: int = 1) -> None:
        self.seen: Counter[str] = Counter()
        self._num_groups = num_groups
        self._rng = random.Random(seed)
        self._max_len, self._budget = max_len, budget
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._known: set[int] = set()
        self._sampled: dict[Sequence, int] = {}
        """The values of the unknown tokens."""

    def __iter__(self) -> Iterator[Step]:
        while True:
            released = self._release()
            self._admit(released)
            rows, new, changes = self._schedule()
            output = make_output(rows, new, changes, released)
            lengths = output.num_new_tokens
            self.seen["mixed"] += 1 in lengths and max(lengths) > 1
            self.seen["decodes"] += bool(lengths) and max(lengths) == 1
            self.seen["empty"] += not lengths
            samples = {
                sequence: self._rng.randrange(128)
                for sequence, length in rows
                if sequence.num_computed_tokens + length == len(sequence.token_ids)
            }
            failed = [sequence for sequence in samples if self._rng.random() < 0.02]
            self.seen["failed"] += len(failed)
            kept = [sequence for sequence in samples if sequence not in failed]
            self._rng.shuffle(kept)
            ids = [self._ids(sequence, length) for sequence, length in rows]
            sampled_ids = torch.tensor([samples[sequence] for sequence in kept]).long()
            sequences = [sequence for sequence, _ in rows]
            kept_specs = [sequence.spec() for sequence in kept]
            yield Step(output, sequences, ids, kept_specs, sampled_ids)
            self._advance(rows, samples, set(failed))

    def _release(self) -> list[int]:
        released = []
        for sequence in list(self._running):
            full = len(sequence.token_ids) >= self._max_len
            if full or self._rng.random() < 0.1:
                self._running.remove(sequence)
                if sequence.seq_id in self._known:
                    released.append(sequence.seq_id)
                    self._known.remove(sequence.seq_id)
                sequence.num_computed_tokens = 0
                sequence.block_table, sequence.other_tables = [], []
                if len(sequence.token_ids) < self._max_len - 20:
                    self._waiting.append(sequence)
        return released

    def _admit(self, released: list[int]) -> None:
        rng = self._rng
        while len(self._running) < MAX_NUM_SEQS and rng.random() < 0.5:
            ready = [s for s in self._waiting if s.token_ids[-1] != UNKNOWN_TOKEN]
            parents = [s for s in self._running if s.num_computed_tokens]
            if ready and rng.random() < 0.5:
                self._waiting.remove(ready[-1])
                self._running.append(ready[-1])
                self.seen["returned"] += ready[-1].seq_id in released
            elif parents and rng.random() < 0.3:
                parent = rng.choice(parents)
                computed = parent.num_computed_tokens
                child = make_sequence([*parent.token_ids[:computed], rng.randrange(128)], 8)
                child.block_table, *child.other_tables = map(list, self._tables(parent))
                child.num_computed_tokens = computed
                self._running.append(child)
                self.seen["forked"] += 1
            else:
                prompt = [rng.randrange(128) for _ in range(rng.randint(1, self._max_len // 2))]
                self._running.append(make_sequence(prompt, 8))

    def _schedule(
        self,
    ) -> tuple[list[tuple[Sequence, int]], list[Sequence], list[TableChange]]:
        rng = self._rng
        rows, new, changes, left = [], [], [], self._budget
        for sequence in self._running if rng.random() < 0.95 else []:
            computed = sequence.num_computed_tokens
            to_do = len(sequence.token_ids) - computed
            length = min(left, rng.randint(1, to_do) if to_do > 1 else 1)
            if length == 0 or rng.random() < 0.1:
                self.seen["left out"] += 1
                continue
            left -= length
            first = held = len(sequence.block_table)
            tail = computed // BLOCK_SIZE
            is_known, tables = sequence.seq_id in self._known, self._tables(sequence)
            if tail < held and rng.random() < 0.1:
                first = tail
                for table in tables:
                    table[tail] = rng.randrange(1000)
                self.seen["copied on write"] += 1
            for group, table in enumerate(tables):
                while len(table) * BLOCK_SIZE < computed + length:
                    table.append(rng.randrange(1000))
                if is_known and len(table) > first:
                    changes.append(TableChange(sequence.seq_id, first, table[first:], group))
                if group and is_known and held and rng.random() < 0.1:
                    start = rng.randrange(held)
                    end = rng.randint(start + 1, held)
                    table[start:end] = [1000] * (end - start)
                    change = TableChange(sequence.seq_id, start, table[start:end], group)
                    changes.append(change)
                    self.seen["given back"] += 1
            if not is_known:
                new.append(sequence)
            self._known.add(sequence.seq_id)
            rows.append((sequence, length))
        rng.shuffle(rows)
        return rows, new, changes

    def _tables(self, sequence: Sequence) -> list[list[int]]:
        if not sequence.other_tables:
            sequence.other_tables = [[] for _ in range(self._num_groups - 1)]
        return [sequence.block_table, *sequence.other_tables]

    def _ids(self, sequence: Sequence, length: int) -> list[int]:
        start = sequence.num_computed_tokens
        ids = sequence.token_ids[start : start + length]
        if ids[-1] == UNKNOWN_TOKEN:
            self.seen["unknown"] += 1
            ids[-1] = self._sampled[sequence]
        return ids

    def _advance(
        self, rows: list[tuple[Sequence, int]], samples: dict[Sequence, int], failed: set[Sequence]
    ) -> None:
        """Take the tokens of the last step; those of this one may be known as well or still on
        their way."""
        for sequence, token_id in self._sampled.items():
            if sequence.token_ids[-1] == UNKNOWN_TOKEN:
                sequence.token_ids[-1] = token_id
        self._sampled = samples | dict.fromkeys(failed, 0)
        ahead = self._rng.random() < 0.7
        for sequence, length in rows:
            sequence.num_computed_tokens += length
            if sequence in samples:
                sequence.token_ids.append(UNKNOWN_TOKEN if ahead else self._sampled[sequence])
