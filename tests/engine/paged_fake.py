"""A worker without a model whose K/V is the tokens themselves, so that every read can be proven.

Each slot remembers which tokens, from the first on, led to it. Executing a row reads back the
whole context through the block table: one wrong share, missed copy or early reuse raises.
"""

from __future__ import annotations

import copy as copying
from collections.abc import Callable

from quire.engine.errors import DeviceMemoryError
from quire.engine.outputs import ModelRunnerOutput, RowError, SchedulerOutput, TokenLogprobs
from quire.engine.sequence import UNKNOWN_TOKEN, Sequence
from quire.engine.worker_protocol import Results

NextToken = Callable[[Sequence], int]


def chain(history: int, token_id: int) -> int:
    return hash((history, token_id))


def next_token(sequence: Sequence) -> int:
    """Depends on the sequence's own tokens, choice and nothing else."""
    history = sequence.choice
    for token_id in sequence.token_ids:
        history = chain(history, token_id)
    return history % 97 + 3  # 0 to 2 are left to tests, as stop tokens


def logprobs(token_ids: list[int]) -> dict[int, float]:
    """The model's log-probabilities after these tokens, of a vocabulary of 16; likeliest first.
    They are hashes, and no two are equal."""
    history = 0
    for token_id in token_ids:
        history = chain(history, token_id)
    made = {token: -(hash((history, token)) % 10_007) / 1_000 - token / 1e6 for token in range(16)}
    return dict(sorted(made.items(), key=lambda item: -item[1]))


class PagedFakeWorker:
    """`errors[request_id]` makes that request's next sampled row fail."""

    def __init__(self, num_blocks: int, block_size: int, sample: NextToken = next_token) -> None:
        self.block_size = block_size
        self.sample = sample
        self.errors: dict[str, RowError] = {}
        self.tables: dict[int, list[int]] = {}
        self.num_tokens = 0
        self._slots: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._sampled: dict[int, int] = {}
        self.num_fed_back = 0
        self.runs_out_of_memory: Callable[[SchedulerOutput], bool] = lambda output: False

    def launch(self, output: SchedulerOutput) -> Results:
        """As on a device, a step runs in the order of its launch, with the tables that it had then;
        only its results may be asked for later."""
        result = self.execute(output)
        return lambda: result

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        self._update_tables(output)
        output = output._replace(sequences=[self._known(one) for one in output.sequences])
        assert len({copy.destination for copy in output.block_copies}) == len(output.block_copies)
        sources = [list(self._slots[copy.source]) for copy in output.block_copies]
        for copy, content in zip(output.block_copies, sources, strict=True):
            self._slots[copy.destination] = content
        if self.runs_out_of_memory(output):
            raise DeviceMemoryError("the device ran out of memory in a step")
        rows = list(
            zip(output.sequences, output.num_computed_starts, output.num_new_tokens, strict=True)
        )
        assert len({sequence.seq_id for sequence, _, _ in rows}) == len(rows)
        assert sum(num_new for _, _, num_new in rows) == output.total_tokens
        for sequence, start, num_new in rows:  # all write before any reads, as kernels do
            self._write(sequence, start, num_new)
        for sequence, start, num_new in rows:
            self._read_back(sequence, start + num_new)
        output.before_sampling()
        token_ids: list[int | None] = []
        errors: dict[int, RowError] = {}
        top: dict[int, TokenLogprobs] = {}
        for row, (sequence, start, num_new) in enumerate(rows):
            complete = start + num_new == len(sequence.token_ids)
            error = self.errors.get(sequence.request.request_id)
            if complete and error is not None:
                errors[row] = error
            token_ids.append(self.sample(sequence) if complete and error is None else None)
            if complete and sequence.num_logprobs is not None:
                best = list(logprobs(sequence.token_ids).items())[: sequence.num_logprobs]
                ids, values = [token for token, _ in best], [value for _, value in best]
                top[row] = TokenLogprobs(ids[0], values[0], 1, ids, values)
        self.num_tokens += output.total_tokens
        pairs = zip(output.sequences, token_ids, strict=True)
        self._sampled = {one.seq_id: token for one, token in pairs if token is not None}
        return ModelRunnerOutput(token_ids, top, {}, errors, {})

    def _known(self, sequence: Sequence) -> Sequence:
        """The sequence with the token that the last step sampled for it; a failed row's is 0."""
        assert UNKNOWN_TOKEN not in sequence.token_ids[:-1]
        if sequence.token_ids[-1] != UNKNOWN_TOKEN:
            return sequence
        self.num_fed_back += 1
        known = copying.copy(sequence)
        known.token_ids = [*sequence.token_ids[:-1], self._sampled.get(sequence.seq_id, 0)]
        return known

    def _update_tables(self, output: SchedulerOutput) -> None:
        """Keep tables by the declared changes alone: an undeclared one shows as a difference."""
        for seq_id in output.released:
            self.tables.pop(seq_id, None)
        for sequence, start in output.table_changes:
            if sequence.seq_id in self.tables:
                self.tables[sequence.seq_id][start:] = sequence.block_table[start:]
        for sequence in output.sequences:
            table = self.tables.setdefault(sequence.seq_id, list(sequence.block_table))
            assert table == sequence.block_table, sequence

    def _histories(self, sequence: Sequence, end: int) -> list[int]:
        history, histories = 0, []
        for token_id in sequence.token_ids[:end]:
            history = chain(history, token_id)
            histories.append(history)
        return histories

    def _write(self, sequence: Sequence, start: int, num_new: int) -> None:
        assert num_new >= 1
        histories = self._histories(sequence, start + num_new)
        for position in range(start, start + num_new):
            block = sequence.block_table[position // self.block_size]
            self._slots[block][position % self.block_size] = histories[position]

    def _read_back(self, sequence: Sequence, end: int) -> None:
        for position, history in enumerate(self._histories(sequence, end)):
            block = sequence.block_table[position // self.block_size]
            found = self._slots[block][position % self.block_size]
            assert found == history, f"{sequence}: foreign K/V at position {position}"
