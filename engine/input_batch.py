"""The packed inputs of a step, from rows that persist between steps.

A sequence keeps a row while it runs; only what changed of its block table is written. Everything
per token is computed with numpy vectors; what the device needs goes over in one copy per field,
into buffers whose addresses never change (a CUDA graph reads them in place).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Sizes
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .outputs import SchedulerOutput
from .sequence import UNKNOWN_TOKEN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .sequence import Sequence


class HostStep(NamedTuple):
    """One step on the host. Batch row i is `SchedulerOutput.sequences[order[i]]`.

    Rows with one new token come first (`num_decodes`). `sampling_rows` are the batch rows that
    reach their sequence's last token, ascending, to sample the ones at `sampled_positions`; rows
    that are pooled stand in `pooled_rows` and sample nothing. `any_scored` says whether a request
    asks for its prompt's log-probabilities. The token of `unknown_rows` is still being sampled:
    their input id is 0.
    """

    order: list[int]
    sequences: list[Sequence]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    num_decodes: int
    max_query_len: int
    sampling_rows: NDArray[np.int64]
    sampled_positions: list[int]
    pooled_rows: list[int]
    any_scored: bool
    unknown_rows: list[int]
    slot_mapping: NDArray[np.int64]
    block_table: NDArray[np.int32]
    query_start_loc: NDArray[np.int32]
    seq_lens: NDArray[np.int32]


class DeviceStep(NamedTuple):
    """The step's tensors on the device, views of persistent buffers: valid until the next step.

    Where decode-only steps are padded, S and T are the padded size: see `InputBatch.pad_decodes`.

    input_ids, positions, slot_mapping `[T]` int64; block_table `[S, max_blocks]`, query_start_loc
    `[S + 1]`, seq_lens `[S]` int32; logit_indices `[R]` int64, the last token of each sampling row.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    logit_indices: torch.Tensor


class _Batch(NamedTuple):
    """What is the same in every step of the same sequences. `rows` are parallel to them."""

    sequences: list[Sequence]
    rows: NDArray[np.int64]
    any_pooled: bool
    any_scored: bool


class PersistentBuffer:
    """A host array and its copy on the device, of fixed capacity; on the CPU they are one."""

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = torch.zeros(capacity, dtype=dtype, pin_memory=pinned)
        self._device = self._host.to(device) if pinned else self._host
        self.array: NDArray[Any] = self._host.numpy()

    def on_device(self, count: int) -> torch.Tensor:
        """The first `count` elements, always at the same address."""
        return self._device[:count]

    def upload(self, count: int) -> torch.Tensor:
        """Send the first `count` elements without waiting for the copy."""
        if self._device is self._host:
            return self._host[:count]
        return self._device[:count].copy_(self._host[:count], non_blocking=True)


class InputBatch:
    """Rows of running sequences and the buffers of a step.

    At most `max_num_seqs` sequences have a row; a step has at most `max_num_tokens` tokens.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._block_size = block_size
        self._rows: dict[int, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._batch = _Batch([], np.empty(0, dtype=np.int64), False, False)
        # A last sampled token may own a slot without being fed back, hence one more.
        max_blocks = self._max_blocks = max_model_len // block_size + 1
        self._table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._input_ids = PersistentBuffer(max_num_tokens, torch.int64, device)
        self._positions = PersistentBuffer(max_num_tokens, torch.int64, device)
        self._slots = PersistentBuffer(max_num_tokens, torch.int64, device)
        self._query_start_loc = PersistentBuffer(max_num_seqs + 1, torch.int32, device)
        self._seq_lens = PersistentBuffer(max_num_seqs, torch.int32, device)
        self._logit_indices = PersistentBuffer(max_num_seqs, torch.int64, device)
        self._block_table = PersistentBuffer(max_num_seqs * max_blocks, torch.int32, device)
        self._padded_sizes: Sizes[int] = ()
        self._padded_table = torch.empty(0, max_blocks, dtype=torch.int32, device=device)
        self._uploaded: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def pad_decodes(self, sizes: Sizes[int]) -> None:
        """From now on give steps in which every row has one token the next larger of these
        (ascending) sizes, if there is one, and tables of one stride: so all steps of a size read
        the tensors of `static_step(size)`. A padded row has length 0 and slot −1."""
        largest = max(sizes, default=0)
        self._padded_sizes = sizes
        self._padded_table = self._padded_table.new_zeros((largest, self._max_blocks))
        self._slots.array[:largest] = -1  # static steps are run once before there is any
        self._slots.upload(largest)

    def static_step(self, size: int) -> DeviceStep:
        """The tensors of every padded step of `size` rows; as they are now, all rows sample."""
        return DeviceStep(
            input_ids=self._input_ids.on_device(size),
            positions=self._positions.on_device(size),
            slot_mapping=self._slots.on_device(size),
            block_table=self._padded_table[:size],
            query_start_loc=self._query_start_loc.on_device(size + 1),
            seq_lens=self._seq_lens.on_device(size),
            logit_indices=self._logit_indices.on_device(size),
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
                self._table[row, start : len(sequence.block_table)] = sequence.block_table[start:]
        # Sequences compare by identity: this is a scan of pointers.
        if output.released or output.sequences != self._batch.sequences:
            self._batch = self._find_rows(output.sequences)

    def _find_rows(self, sequences: list[Sequence]) -> _Batch:
        """New sequences get a row."""
        for sequence in sequences:
            if sequence.seq_id not in self._rows:
                row = self._rows[sequence.seq_id] = self._free_rows.pop()
                self._table[row, : len(sequence.block_table)] = sequence.block_table
        return _Batch(
            sequences,
            np.array([self._rows[sequence.seq_id] for sequence in sequences], dtype=np.int64),
            any(one.pooling is not None for one in sequences),
            any(one.request.sampling_params.prompt_logprobs is not None for one in sequences),
        )

    def prepare(self, output: SchedulerOutput) -> tuple[HostStep, DeviceStep]:
        """Lay out the step that `apply` was just called for."""
        if self._uploaded is not None:  # the last step's copies still read the host buffers
            self._uploaded.synchronize()
        sequences, rows = output.sequences, self._batch.rows
        num_seqs, num_tokens = len(sequences), output.total_tokens
        counts = np.array(output.num_new_tokens, dtype=np.int64)
        starts = np.array(output.num_computed_starts, dtype=np.int64)
        picked, num_decodes = list(range(num_seqs)), num_seqs
        if num_tokens > num_seqs:
            order = np.argsort(counts > 1, kind="stable")
            counts, starts, rows = counts[order], starts[order], rows[order]
            picked = order.tolist()
            sequences = [sequences[index] for index in picked]
            num_decodes = int(np.count_nonzero(counts == 1))
        stops = starts + counts

        unknown_rows = self._fill_input_ids(
            sequences, starts.tolist(), stops.tolist(), num_decodes, num_tokens
        )
        loc = self._query_start_loc.array
        np.cumsum(counts, out=loc[1 : num_seqs + 1])
        self._seq_lens.array[:num_seqs] = stops
        positions = self._positions.array[:num_tokens]
        slots = self._slots.array[:num_tokens]
        positions[:] = np.arange(num_tokens) + np.repeat(starts - loc[:num_seqs], counts)
        blocks, offsets = np.divmod(positions, self._block_size)
        slots[:] = self._table[np.repeat(rows, counts), blocks]
        slots *= self._block_size
        slots += offsets

        pooled_rows = []
        if self._batch.any_pooled:
            pooled_rows = [row for row, sequence in enumerate(sequences) if sequence.pooling]
        ends = np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.int64)
        ends[pooled_rows] = 0
        sampling_rows = np.nonzero(stops == ends)[0]
        self._logit_indices.array[: len(sampling_rows)] = loc[sampling_rows + 1] - 1
        width = -(-int(stops.max()) // self._block_size)
        table = self._block_table.array[: num_seqs * width].reshape(num_seqs, width)
        np.take(self._table[:, :width], rows, axis=0, out=table)
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
            unknown_rows=unknown_rows,
            slot_mapping=slots,
            block_table=table,
            query_start_loc=loc[: num_seqs + 1],
            seq_lens=self._seq_lens.array[:num_seqs],
        )
        return host, self._upload(num_tokens, num_seqs, width, len(sampling_rows))

    def _upload(self, num_tokens: int, num_seqs: int, width: int, num_logits: int) -> DeviceStep:
        table = self._block_table.upload(num_seqs * width).view(num_seqs, width)
        if num_tokens == num_seqs and num_seqs <= max(self._padded_sizes, default=0):
            size = self._padded_sizes[bisect_left(self._padded_sizes, num_seqs)]
            self._input_ids.array[num_seqs:size] = 0
            self._slots.array[num_seqs:size] = -1
            self._seq_lens.array[num_seqs:size] = 0
            self._padded_table[:num_seqs, :width] = table
            table, num_tokens, num_seqs = self._padded_table[:size], size, size
        step = DeviceStep(
            input_ids=self._input_ids.upload(num_tokens),
            positions=self._positions.upload(num_tokens),
            slot_mapping=self._slots.upload(num_tokens),
            block_table=table,
            query_start_loc=self._query_start_loc.upload(num_seqs + 1),
            seq_lens=self._seq_lens.upload(num_seqs),
            logit_indices=self._logit_indices.upload(num_logits),
        )
        if self._uploaded is not None:
            self._uploaded.record()
        return step

    def _fill_input_ids(
        self,
        sequences: list[Sequence],
        starts: list[int],
        stops: list[int],
        num_decodes: int,
        num_tokens: int,
    ) -> list[int]:
        """Returns the rows whose token is unknown; only those with one new token can be."""
        ids = self._input_ids.array
        ids[:num_decodes] = [
            sequence.token_ids[start]
            for sequence, start in zip(sequences[:num_decodes], starts, strict=False)
        ]
        tail = (
            sequence.token_ids[start:stop]
            for sequence, start, stop in zip(
                sequences[num_decodes:], starts[num_decodes:], stops[num_decodes:], strict=True
            )
        )
        ids[num_decodes:num_tokens] = np.fromiter(
            chain.from_iterable(tail), dtype=np.int64, count=num_tokens - num_decodes
        )
        unknown = np.nonzero(ids[:num_decodes] == UNKNOWN_TOKEN)[0]
        ids[unknown] = 0
        return unknown.tolist()
