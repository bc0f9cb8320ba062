"""A worker without a model whose K/V is the tokens themselves, so that every read can be checked.

Each slot stores a hash of all tokens up to its own. Executing a row reads its whole context back
through the block table, so one wrong share, missed copy or early reuse raises. If layers have
several groups, it does so in each, as far as the group's window reaches. A state slot, if the
sequence has one, stores the hash of all tokens so far. The worker uses only the encoded plan, as a
worker in another process would.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from quire.engine.errors import DeviceMemoryError
from quire.engine.layers.layer_groups import first_token
from quire.engine.outputs import RowError, TokenLogprobs
from quire.engine.step import (
    NO_CONSTRAINTS,
    UNKNOWN_TOKEN,
    ModelRunnerOutput,
    SamplingConstraints,
    SchedulerOutput,
    SequenceSpec,
)
from quire.engine.worker_protocol import Results

SLOT_BYTES = 8
"""Bytes of what a slot stores."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(SchedulerOutput)


@dataclass
class KnownSequence:
    """What the plans so far say of a sequence, and the tokens sampled for it."""

    spec: SequenceSpec
    token_ids: list[int]
    tables: list[list[int]]
    """The block table of each group of layers."""
    num_drafts: int = 0
    """How many of the last tokens are guesses of the last plan."""

    @property
    def choice(self) -> int:
        return self.spec.choice

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.spec.num_prompt_tokens

    def before_drafts(self) -> list[KnownSequence]:
        """Return the sequence as it stands without its drafts, and then with each more of them."""
        known = len(self.token_ids) - self.num_drafts
        return [
            KnownSequence(self.spec, self.token_ids[: known + count], self.tables)
            for count in range(self.num_drafts + 1)
        ]

    def take(self, start: int, tokens: list[int]) -> None:
        """Store the tokens from `start` on, which must agree with those already known."""
        known = self.token_ids[start : start + len(tokens)]
        assert known == tokens[: len(known)], f"{self}: the plan says {tokens}"
        self.token_ids[start : start + len(tokens)] = tokens


NextToken = Callable[[KnownSequence], int]


def chain(history: int, token_id: int) -> int:
    return hash((history, token_id))


def next_token(sequence: KnownSequence) -> int:
    """Sample a token that depends only on the sequence's own tokens and choice."""
    history = sequence.choice
    for token_id in sequence.token_ids:
        history = chain(history, token_id)
    return history % 97 + 3  # 0 to 2 are left to tests, as stop tokens


def logprobs(token_ids: list[int]) -> dict[int, float]:
    """Return the model's log-probabilities after these tokens, likeliest first.

    The vocabulary has 16 tokens. The values are hashes, and no two are equal.
    """
    history = 0
    for token_id in token_ids:
        history = chain(history, token_id)
    made = {token: -(hash((history, token)) % 10_007) / 1_000 - token / 1e6 for token in range(16)}
    return dict(sorted(made.items(), key=lambda item: -item[1]))


class _Executed:
    """A step whose rows have been written and read back."""

    def __init__(self, worker: PagedFakeWorker, output: SchedulerOutput) -> None:
        self._worker = worker
        self._output = output

    def sample(self, constraints: SamplingConstraints) -> Results:
        result = self._worker.sample_rows(self._output)
        return lambda: result


class PagedFakeWorker:
    """A worker that samples hashes.

    `errors[request_id]` makes that request's next sampled row fail. `right` is the chance of each
    token that it drafts.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        sample: NextToken = next_token,
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        self.block_size = block_size
        self.windows = windows
        self.null_block = num_blocks
        self.sample = sample
        self.errors: dict[str, RowError] = {}
        self.known: dict[int, KnownSequence] = {}
        self.num_tokens = 0
        self._slots: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks + 1)]
        self.states: dict[int, int | None] = {}
        """By slot; None: garbage."""
        self._sampled: dict[int, int] = {}
        self.num_fed_back = 0
        self._last_step = 0
        self.lag = 0
        """Steps for whose copies it does not say yet that they have ended."""
        self.right, self.chance = 1.0, random.Random(0)
        self.runs_out_of_memory: Callable[[SchedulerOutput], bool] = lambda output: False

    def attach_host_memory(self, memory: memoryview) -> float:
        """Save blocks to `memory` and load them from there."""
        self._host_memory = memory
        return 1e-6

    def copies_ended(self) -> int:
        return self._last_step - self.lag

    def _host_slot(self, slot: int) -> memoryview:
        size = SLOT_BYTES * self.block_size
        return self._host_memory[slot * size : (slot + 1) * size]

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        return self.forward(output).sample(NO_CONSTRAINTS)()

    def request_ids(self, output: SchedulerOutput) -> list[str]:
        """Return the request of each row of a plan, whether or not the plan was executed."""
        names = {seq_id: one.spec.request_id for seq_id, one in self.known.items()}
        names |= {spec.seq_id: spec.request_id for spec in output.new_sequences}
        return [names[seq_id] for seq_id in output.seq_ids]

    def propose(self, output: SchedulerOutput) -> dict[int, list[int]]:
        """Guess the tokens that will be sampled, each rightly with a chance of `right`."""
        self._begin(output)
        drafts: dict[int, list[int]] = {}
        for row, count in output.rows_to_propose.items():
            sequence, start = self.known[output.seq_ids[row]], output.num_computed_starts[row]
            first = sum(output.num_new_tokens[:row])
            token_ids = [*sequence.token_ids[:start], output.token_ids[first]]
            for _ in range(count):
                guess = self.sample(KnownSequence(sequence.spec, token_ids, []))
                token_ids.append(guess if self.chance.random() < self.right else 1)
            drafts[row] = token_ids[start + 1 :]
        return drafts

    def _begin(self, output: SchedulerOutput) -> None:
        """Do what comes before a forward: tables, and copies of blocks."""
        assert _decoder.decode(_encoder.encode(output)) == output
        self._update_known(output)
        self._last_step = output.step
        for block, slot in output.block_saves:
            self._host_slot(slot)[:] = struct.pack(f"{self.block_size}q", *self._slots[block])
        for slot, block in output.block_loads:
            self._slots[block] = list(struct.unpack(f"{self.block_size}q", self._host_slot(slot)))
        assert len({copy.destination for copy in output.block_copies}) == len(output.block_copies)
        sources = [list(self._slots[copy.source]) for copy in output.block_copies]
        for copy, content in zip(output.block_copies, sources, strict=True):
            self._slots[copy.destination] = content
        for source, destination in output.state_copies:
            self.states[destination] = self.states[source]

    def forward(self, output: SchedulerOutput) -> _Executed:
        """Run a step at its launch, with the block tables of that moment, as a device does.

        Only its results may be asked for later.
        """
        output = _decoder.decode(_encoder.encode(output))
        self._begin(output)
        assert not output.rows_to_propose
        if self.runs_out_of_memory(output):
            for seq_id in output.seq_ids:  # some layers have changed their states
                self.states[self.known[seq_id].spec.state_slot] = None
            raise DeviceMemoryError("the device ran out of memory in a step")
        assert len(set(output.seq_ids)) == len(output.seq_ids)
        assert sum(output.num_new_tokens) == output.total_tokens
        left = list(output.token_ids)
        rows = [
            (self.known[seq_id], start, num_new)
            for seq_id, start, num_new in zip(
                output.seq_ids, output.num_computed_starts, output.num_new_tokens, strict=True
            )
        ]
        for row, (sequence, start, num_new) in enumerate(rows):
            tokens = self._values(sequence, left[:num_new])
            del left[:num_new]
            if sequence.num_drafts:  # some may have been wrong
                del sequence.token_ids[start:]
            sequence.num_drafts = len(output.drafts.get(row, ()))
            assert tokens[len(tokens) - sequence.num_drafts :] == output.drafts.get(row, [])
            sequence.take(start, tokens)
            is_partial = len(sequence.token_ids) > start + num_new
            assert is_partial == (row in output.partial_rows)
        for sequence, start, num_new in rows:  # all write before any reads, as kernels do
            self._write(sequence, start, num_new)
        for sequence, start, num_new in rows:
            self._read_back(sequence, start, start + num_new)
        for row, (sequence, start, num_new) in enumerate(rows):
            if sequence.spec.state_slot >= 0:
                self._pass_state(output, row, sequence, start, start + num_new)
        return _Executed(self, output)

    def sample_rows(self, output: SchedulerOutput) -> ModelRunnerOutput:
        token_ids: list[int | None] = []
        errors: dict[int, RowError] = {}
        after_drafts: dict[int, list[int | None]] = {}
        top: dict[int, TokenLogprobs] = {}
        sampled: dict[int, int] = {}
        for row, seq_id in enumerate(output.seq_ids):
            sequence = self.known[seq_id]
            complete = row not in output.partial_rows
            error = self.errors.get(sequence.spec.request_id)
            if complete and error is not None:
                errors[row] = error
            first, *others = sequence.before_drafts()
            token = self.sample(first) if complete and error is None else None
            token_ids.append(token)
            if others:
                after_drafts[row] = [self.sample(one) for one in others]
            num_logprobs = sequence.spec.num_logprobs
            if complete and num_logprobs is not None:
                best = list(logprobs(sequence.token_ids).items())[:num_logprobs]
                ids, values = [token for token, _ in best], [value for _, value in best]
                top[row] = TokenLogprobs(ids[0], values[0], 1, ids, values)
            if token is not None:
                sampled[seq_id] = token
        self.num_tokens += output.total_tokens
        self._sampled = sampled
        return ModelRunnerOutput(token_ids, top, {}, errors, {}, after_drafts, {})

    def _values(self, sequence: KnownSequence, tokens: list[int]) -> list[int]:
        """Replace an unknown token by the one that the last step sampled; 0 for a failed row."""
        assert UNKNOWN_TOKEN not in tokens[:-1]
        if tokens != [UNKNOWN_TOKEN]:
            assert UNKNOWN_TOKEN not in tokens
            return tokens
        self.num_fed_back += 1
        return [self._sampled.get(sequence.spec.seq_id, 0)]

    def _update_known(self, output: SchedulerOutput) -> None:
        for seq_id in output.released:
            del self.known[seq_id]
        for spec in output.new_sequences:
            assert spec.seq_id not in self.known and UNKNOWN_TOKEN not in spec.token_ids
            tables = [list(table) for table in (spec.block_table, *spec.other_tables)]
            assert len(tables) == len(self.windows)
            self.known[spec.seq_id] = KnownSequence(spec, list(spec.token_ids), tables)
        for seq_id, start, block_ids, group in output.table_changes:
            self.known[seq_id].tables[group][start : start + len(block_ids)] = block_ids

    def _histories(self, sequence: KnownSequence, end: int) -> list[int]:
        history, histories = 0, []
        for token_id in sequence.token_ids[:end]:
            history = chain(history, token_id)
            histories.append(history)
        return histories

    def _write(self, sequence: KnownSequence, start: int, num_new: int) -> None:
        assert num_new >= 1
        histories = self._histories(sequence, start + num_new)
        for group, table in enumerate(sequence.tables):
            for position in range(start, start + num_new):
                block = table[position // self.block_size]
                assert block != self.null_block
                self._slots[block][position % self.block_size] = histories[position] + group

    def _pass_state(
        self, output: SchedulerOutput, row: int, sequence: KnownSequence, start: int, end: int
    ) -> None:
        """Check the state before a row, and leave the one after it and the snapshots."""
        histories = [0, *self._histories(sequence, end)]
        slot = sequence.spec.state_slot
        if start:
            assert self.states[slot] == histories[start], f"{sequence}: foreign state"
        self.states[slot] = histories[end]
        for save in output.state_saves:
            if save.row == row:
                assert start < save.num_tokens <= end
                self.states[save.slot] = histories[save.num_tokens]

    def _read_back(self, sequence: KnownSequence, start: int, end: int) -> None:
        histories = self._histories(sequence, end)
        for group, (table, window) in enumerate(zip(sequence.tables, self.windows, strict=True)):
            # Kernels may read what lies before a window, too: there are the sequence's own blocks,
            # and before them the null block.
            first = next(i for i, block in enumerate(table) if block != self.null_block)
            needed = 0 if window is None else first_token(window, start)
            assert first * self.block_size <= needed, f"{sequence}: {table} lacks a block"
            for position in range(first * self.block_size, end):
                block = table[position // self.block_size]
                found = self._slots[block][position % self.block_size]
                wanted = histories[position] + group
                assert found == wanted, f"{sequence}: foreign K/V at position {position}"
