"""The packed inputs of a step, from rows that persist between steps.

A sequence keeps a row while it runs; only what changed of its block table is written. The numbers
of each token are computed by the device's StepInputs: by numpy on the CPU, by a kernel on CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..devices.backend import Backend
from ..devices.steps import DeviceStep, HostStep, StepInputs
from ..parallel.step_plan import PlanReader, TableEntries
from ..step import UNKNOWN_TOKEN, SchedulerOutput, SequenceSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


class _Batch(NamedTuple):
    """What is the same in every step of the same sequences. `rows` are parallel to them."""

    seq_ids: list[int]
    sequences: list[SequenceSpec]
    rows: NDArray[np.int64]
    any_pooled: bool
    any_scored: bool
    adapter_slots: NDArray[np.int64] | None
    """None if no sequence has an adapter."""
    order: list[int]
    """All indices into `sequences`, as `everyone`."""
    everyone: NDArray[np.int64]
    ones: NDArray[np.int64]
    """A 1 for each of them."""
    loc: NDArray[np.int32]
    """The query_start_loc of steps of one token each."""

    @classmethod
    def of(cls, seq_ids: list[int], sequences: list[SequenceSpec], rows: list[int]) -> _Batch:
        """Describe the steps of these sequences."""
        count = len(rows)
        return cls(
            seq_ids,
            sequences,
            np.array(rows, dtype=np.int64),
            any(one.pooling is not None for one in sequences),
            any(one.num_prompt_logprobs is not None for one in sequences),
            _adapter_slots(sequences),
            order=list(range(count)),
            everyone=np.arange(count),
            ones=np.ones(count, dtype=np.int64),
            loc=np.arange(count + 1, dtype=np.int32),
        )


class InputBatch:
    """Rows of running sequences, and each step's layout.

    At most `max_num_seqs` sequences have a row; a step has at most `max_num_tokens` tokens.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
        block_size: int,
        backend: Backend,
        num_groups: int = 1,
        records_tables: bool = False,
    ) -> None:
        """`num_groups` groups of layers have block tables. With `records_tables`, `table_entries`
        has what is written to block tables, until somebody takes it."""
        self._block_size = block_size
        self._rows: dict[int, int] = {}
        self._specs: dict[int, SequenceSpec] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._batch = _Batch.of([], [], [])
        # A last sampled token may own a slot without being fed back, hence one more.
        max_blocks = max_model_len // block_size + 1
        self._table = np.zeros((num_groups, max_num_seqs, max_blocks), dtype=np.int32)
        self._sampled = torch.zeros(1, dtype=torch.int64, device=backend.device)
        self._sampled_of: list[SequenceSpec] = []
        self._records_tables = records_tables
        self.table_entries: list[TableEntries] = []
        self.inputs: StepInputs = backend.make_inputs(
            max_num_seqs, max_num_tokens, max_blocks, block_size, num_groups
        )

    def make_reader(self) -> PlanReader:
        """Make what turns rank 0's plans into steps for these inputs."""
        return PlanReader(*self._table.shape, self.inputs)

    def apply(self, output: SchedulerOutput) -> None:
        """Bring rows and tables up to date with a plan."""
        for seq_id in output.released:
            del self._specs[seq_id]
            self._free_rows.append(self._rows.pop(seq_id))
        for spec in output.new_sequences:
            self._specs[spec.seq_id] = spec
            self._rows[spec.seq_id] = row = self._free_rows.pop()
            for group, table in enumerate((spec.block_table, *spec.other_tables)):
                self._write_table(group, row, 0, table)
        for seq_id, start, block_ids, group in output.table_changes:
            self._write_table(group, self._rows[seq_id], start, block_ids)
        if output.released or output.seq_ids != self._batch.seq_ids:
            sequences = [self._specs[seq_id] for seq_id in output.seq_ids]
            rows = [self._rows[seq_id] for seq_id in output.seq_ids]
            self._batch = _Batch.of(output.seq_ids, sequences, rows)

    def _write_table(self, group: int, row: int, start: int, block_ids: list[int]) -> None:
        self._table[group, row, start : start + len(block_ids)] = block_ids
        self.inputs.change_table(group, row, start)
        if self._records_tables:
            self.table_entries.append(TableEntries(group, row, start, block_ids))

    def keep_samples(self, sequences: list[SequenceSpec], token_ids: torch.Tensor) -> None:
        """Remember the tokens that a step sampled, `[R]` int64 on the device, for these sequences.

        The next step may have to compute one that the host does not know yet.
        """
        self._sampled_of, self._sampled = sequences, token_ids

    @property
    def sampled(self) -> torch.Tensor:
        """The tokens that the last step sampled, `[R]` int64 on the device."""
        return self._sampled

    def prepare(self, output: SchedulerOutput) -> tuple[HostStep, DeviceStep]:
        """Lay out the step that `apply` was just called for, and make its tensors."""
        host, token_ids = self.lay_out(output)
        return host, self.write(host, token_ids)

    def write(self, host: HostStep, token_ids: NDArray[np.int64]) -> DeviceStep:
        """Make the tensors of a step from its layout."""
        return self.inputs.write(host, token_ids, self._sampled)

    def lay_out(self, output: SchedulerOutput) -> tuple[HostStep, NDArray[np.int64]]:
        """Lay out the step that `apply` was just called for. Returns the layout, and the tokens'
        ids as `StepInputs.write` takes them."""
        # Over 50 lines: half of them are the fields of the result.
        is_plain = not (output.partial_rows or output.drafts or self._batch.any_pooled)
        if is_plain and output.total_tokens == len(output.seq_ids):
            return self._lay_out_decodes(output)
        # 1. The plan's rows as arrays.
        sequences, rows = self._batch.sequences, self._batch.rows
        num_seqs = len(sequences)
        counts = np.array(output.num_new_tokens, dtype=np.int64)
        starts = np.array(output.num_computed_starts, dtype=np.int64)
        token_ids = np.array(output.token_ids, dtype=np.int64)
        samples = np.ones(num_seqs, dtype=np.bool_)
        samples[output.partial_rows] = False
        # 2. Rows with one token first, since the attention kernels treat them apart.
        order, num_decodes = list(range(num_seqs)), num_seqs
        slots = self._batch.adapter_slots
        if output.total_tokens > num_seqs:
            picks = np.argsort(counts > 1, kind="stable")
            token_ids = _reorder(token_ids, counts, picks)
            counts, starts, rows = counts[picks], starts[picks], rows[picks]
            samples = samples[picks]
            slots = None if slots is None else slots[picks]
            order = picks.tolist()
            sequences = [sequences[index] for index in order]
            num_decodes = int(np.count_nonzero(counts == 1))
        # 3. Which rows sample, which are pooled.
        pooled_rows = []
        if self._batch.any_pooled:
            pooled_rows = [row for row, one in enumerate(sequences) if one.pooling is not None]
            samples[pooled_rows] = False
        sampling_rows = np.nonzero(samples)[0]
        sampled_positions = (starts + counts)[sampling_rows]
        num_drafts: list[int] = []
        if output.drafts:
            sampling_rows, sampled_positions, num_drafts = _with_drafts(
                output, order, sampling_rows, sampled_positions
            )
        # 4. Tokens that only the device knows. Then the prefix sums that locate each row's tokens.
        self._point_at_samples(token_ids[:num_decodes], sequences)
        stops = starts + counts
        loc = np.zeros(num_seqs + 1, dtype=np.int32)
        np.cumsum(counts, out=loc[1:])
        width = -(-int(stops.max()) // self._block_size)
        host = HostStep(
            order=order,
            sequences=sequences,
            starts=starts,
            lengths=counts,
            num_decodes=num_decodes,
            max_query_len=int(counts.max()),
            sampling_rows=sampling_rows,
            sampled_positions=sampled_positions.tolist(),
            num_drafts=num_drafts,
            pooled_rows=pooled_rows,
            any_scored=self._batch.any_scored,
            query_start_loc=loc,
            seq_lens=stops.astype(np.int32),
            rows=rows,
            tables=self._table[:, :, :width],
            token_slots=None if slots is None else np.repeat(slots, counts),
        )
        return host, token_ids

    def _lay_out_decodes(self, output: SchedulerOutput) -> tuple[HostStep, NDArray[np.int64]]:
        """Lay out a step of one token for each sequence, all of which sample. Little changes from
        one such step to the next."""
        batch = self._batch
        starts = np.array(output.num_computed_starts, dtype=np.int64)
        token_ids = np.array(output.token_ids, dtype=np.int64)
        if UNKNOWN_TOKEN in output.token_ids:
            self._point_at_samples(token_ids, batch.sequences)
        return self._one_token_each(batch, starts), token_ids

    def _one_token_each(self, batch: _Batch, starts: NDArray[np.int64]) -> HostStep:
        """Return the layout of one token for each sequence, at these positions. All sample."""
        stops = starts + 1
        return HostStep(
            order=batch.order,
            sequences=batch.sequences,
            starts=starts,
            lengths=batch.ones,
            num_decodes=len(starts),
            max_query_len=1,
            sampling_rows=batch.everyone,
            sampled_positions=stops.tolist(),
            num_drafts=[],
            pooled_rows=[],
            any_scored=batch.any_scored,
            query_start_loc=batch.loc,
            seq_lens=stops.astype(np.int32),
            rows=batch.rows,
            tables=self._table[:, :, : -(-int(stops.max()) // self._block_size)],
            token_slots=batch.adapter_slots,
        )

    def prepare_tokens(
        self,
        rows: list[int],
        starts: NDArray[np.int64],
        token_ids: NDArray[np.int64],
        sampled: torch.Tensor,
    ) -> tuple[HostStep, DeviceStep]:
        """Lay out a step of one token for each of these rows of the plan that `apply` was just
        called for, at the position `starts[i]`. All sample. An id −1 − i stands for `sampled[i]`.
        """
        sequences = [self._batch.sequences[row] for row in rows]
        batch = _Batch.of([], sequences, self._batch.rows[rows].tolist())
        # A draft model has no adapters, and nobody scores its prompts.
        batch = batch._replace(order=rows, any_scored=False, adapter_slots=None)
        host = self._one_token_each(batch, starts)
        return host, self.inputs.write(host, token_ids, sampled)

    def _point_at_samples(
        self, token_ids: NDArray[np.int64], sequences: list[SequenceSpec]
    ) -> None:
        """Replace each unknown token by −1 − i if it is the i-th of the last step's samples.

        token_ids[i] is that of sequences[i]. A sequence whose row failed in the last step gets
        token 0: its results will be dropped.
        """
        unknown = np.nonzero(token_ids == UNKNOWN_TOKEN)[0].tolist()
        if unknown:
            places = {one.seq_id: -1 - i for i, one in enumerate(self._sampled_of)}
            token_ids[unknown] = [places.get(sequences[row].seq_id, 0) for row in unknown]


def _adapter_slots(sequences: list[SequenceSpec]) -> NDArray[np.int64] | None:
    """Return the slots of the sequences' adapters; None if none has one."""
    slots = [one.adapter_slot for one in sequences]
    return np.array(slots, dtype=np.int64) if max(slots, default=-1) >= 0 else None


def _reorder(
    token_ids: NDArray[np.int64], counts: NDArray[np.int64], picks: NDArray[np.intp]
) -> NDArray[np.int64]:
    """Return the tokens of the rows `picks`, one row after the other; counts[i] of the given tokens
    belong to row i."""
    firsts = np.cumsum(counts) - counts
    counts, firsts = counts[picks], firsts[picks]
    shifts = firsts - (np.cumsum(counts) - counts)
    reordered: NDArray[np.int64] = token_ids[np.arange(len(token_ids)) + np.repeat(shifts, counts)]
    return reordered


def _with_drafts(
    output: SchedulerOutput,
    order: list[int],
    rows: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Repeat sampling rows, and the positions that they sample last, for rows that sample after
    drafts as well. Returns these, and how many drafts precede each sample."""
    drafted = np.array([len(output.drafts.get(order[row], ())) for row in rows.tolist()])
    counts = drafted + 1
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    num_drafts = np.arange(len(firsts)) - firsts
    sampled = np.repeat(positions - drafted, counts) + num_drafts
    return np.repeat(rows, counts), sampled, num_drafts.tolist()
