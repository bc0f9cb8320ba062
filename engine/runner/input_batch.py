"""The packed inputs of a step, from rows that persist between steps.

A sequence keeps a row while it runs; only what changed of its block table is written. The numbers
of each token are computed by the device's StepInputs: by numpy on the CPU, by a kernel on CUDA.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..devices.backend import Backend
from ..devices.steps import DeviceStep, HostStep, StepInputs
from ..outputs import SchedulerOutput
from ..sequence import UNKNOWN_TOKEN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..sequence import Sequence


class _Batch(NamedTuple):
    """What is the same in every step of the same sequences. `rows` are parallel to them."""

    sequences: list[Sequence]
    rows: NDArray[np.int64]
    any_pooled: bool
    any_scored: bool


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
    ) -> None:
        self._block_size = block_size
        self._rows: dict[int, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._batch = _Batch([], np.empty(0, dtype=np.int64), False, False)
        # A last sampled token may own a slot without being fed back, hence one more.
        max_blocks = max_model_len // block_size + 1
        self._table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._sampled = torch.zeros(1, dtype=torch.int64, device=backend.device)
        self._sampled_of: list[Sequence] = []
        self.inputs: StepInputs = backend.make_inputs(
            max_num_seqs, max_num_tokens, max_blocks, block_size
        )

    def apply(self, output: SchedulerOutput) -> None:
        """Bring rows and tables up to date."""
        for seq_id in output.released:
            row = self._rows.pop(seq_id, None)
            if row is not None:
                self._free_rows.append(row)
        for sequence, start in output.table_changes:
            row = self._rows.get(sequence.seq_id)
            if row is not None:  # otherwise it is new, or left out of this step
                self._write_table(row, sequence, start)
        # Sequences compare by identity: this is a scan of pointers.
        if output.released or output.sequences != self._batch.sequences:
            self._batch = self._find_rows(output.sequences)

    def _find_rows(self, sequences: list[Sequence]) -> _Batch:
        """New sequences get a row."""
        for sequence in sequences:
            if sequence.seq_id not in self._rows:
                row = self._rows[sequence.seq_id] = self._free_rows.pop()
                self._write_table(row, sequence, 0)
        return _Batch(
            sequences,
            np.array([self._rows[sequence.seq_id] for sequence in sequences], dtype=np.int64),
            any(one.pooling is not None for one in sequences),
            any(one.request.sampling_params.prompt_logprobs is not None for one in sequences),
        )

    def _write_table(self, row: int, sequence: Sequence, start: int) -> None:
        self._table[row, start : len(sequence.block_table)] = sequence.block_table[start:]
        self.inputs.change_table(row, start)

    def keep_samples(self, sequences: list[Sequence], token_ids: torch.Tensor) -> None:
        """What a step sampled, token_ids `[R]` int64 on the device: in the next step it may be
        the token that the host does not know yet."""
        self._sampled_of, self._sampled = sequences, token_ids

    def prepare(self, output: SchedulerOutput) -> tuple[HostStep, DeviceStep]:
        """Lay out the step that `apply` was just called for."""
        sequences, rows = output.sequences, self._batch.rows
        num_seqs = len(sequences)
        counts = np.array(output.num_new_tokens, dtype=np.int64)
        starts = np.array(output.num_computed_starts, dtype=np.int64)
        picked, num_decodes = list(range(num_seqs)), num_seqs
        if output.total_tokens > num_seqs:
            order = np.argsort(counts > 1, kind="stable")
            counts, starts, rows = counts[order], starts[order], rows[order]
            picked = order.tolist()
            sequences = [sequences[index] for index in picked]
            num_decodes = int(np.count_nonzero(counts == 1))
        stops = starts + counts
        loc = np.zeros(num_seqs + 1, dtype=np.int32)
        np.cumsum(counts, out=loc[1:])
        pooled_rows = []
        if self._batch.any_pooled:
            pooled_rows = [row for row, sequence in enumerate(sequences) if sequence.pooling]
        ends = np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.int64)
        ends[pooled_rows] = 0
        sampling_rows = np.nonzero(stops == ends)[0]
        width = -(-int(stops.max()) // self._block_size)
        host = HostStep(
            order=picked,
            sequences=sequences,
            starts=starts,
            lengths=counts,
            num_decodes=num_decodes,
            max_query_len=int(counts.max()),
            sampling_rows=sampling_rows,
            sampled_positions=ends[sampling_rows].tolist(),
            pooled_rows=pooled_rows,
            any_scored=self._batch.any_scored,
            query_start_loc=loc,
            seq_lens=stops.astype(np.int32),
            rows=rows,
            tables=self._table[:, :width],
        )
        return host, self.inputs.write(host, self._token_ids(host), self._sampled)

    def _token_ids(self, host: HostStep) -> NDArray[np.int64]:
        """The ids of the step's tokens, in the batch's order; those that the host does not know as
        `StepInputs.write` wants them."""
        starts, stops = host.starts.tolist(), (host.starts + host.lengths).tolist()
        decodes = host.num_decodes
        ids = np.empty(int(host.query_start_loc[-1]), dtype=np.int64)
        ids[:decodes] = [
            sequence.token_ids[start]
            for sequence, start in zip(host.sequences[:decodes], starts, strict=False)
        ]
        tail = (
            sequence.token_ids[start:stop]
            for sequence, start, stop in zip(
                host.sequences[decodes:], starts[decodes:], stops[decodes:], strict=True
            )
        )
        ids[decodes:] = np.fromiter(
            chain.from_iterable(tail), dtype=np.int64, count=len(ids) - decodes
        )
        unknown = np.nonzero(ids[:decodes] == UNKNOWN_TOKEN)[0].tolist()
        if unknown:
            ids[unknown] = self._places_in_samples([host.sequences[row] for row in unknown])
        return ids

    def _places_in_samples(self, sequences: list[Sequence]) -> list[int]:
        """−1 − i for the sequence whose token is the i-th of the last step's. A row that failed
        there gets id 0: its results will be dropped."""
        places = {sequence.seq_id: -1 - i for i, sequence in enumerate(self._sampled_of)}
        return [places.get(sequence.seq_id, 0) for sequence in sequences]
