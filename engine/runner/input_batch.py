"""The packed inputs of a step, from rows that persist between steps.

A sequence keeps a row while it runs; only what changed of its block table is written. The
numbers of each token are computed by numpy on the CPU, and by the device itself on CUDA
(`device_inputs`): into tensors whose addresses never change, for a CUDA graph reads them in place.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as Sizes
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from ..step import UNKNOWN_TOKEN, SchedulerOutput, SequenceSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


class HostStep(NamedTuple):
    """One step on the host. Batch row i is row `order[i]` of the plan.

    Rows with one new token come first (`num_decodes`). `sampling_rows` are the batch rows that
    sample, ascending, and `sampled_positions` the positions of their new tokens; `pooled_rows` are
    those whose hidden states are pooled. `any_scored` says whether a request
    asks for its prompt's log-probabilities. Row i's block table is `tables[rows[i]]`, of which no
    row uses more columns.
    """

    order: list[int]
    sequences: list[SequenceSpec]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    num_decodes: int
    max_query_len: int
    sampling_rows: NDArray[np.int64]
    sampled_positions: list[int]
    pooled_rows: list[int]
    any_scored: bool
    query_start_loc: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    rows: NDArray[np.int64]
    tables: NDArray[np.int32]


class DeviceStep(NamedTuple):
    """The step's tensors on the device, views of persistent buffers: valid until the next step.

    Where decode-only steps are padded, S and T are the padded size: see `StepInputs.pad_decodes`.

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

    @classmethod
    def allocate(
        cls, num_tokens: int, num_seqs: int, max_blocks: int, device: torch.device
    ) -> DeviceStep:
        """Buffers for steps of at most so many tokens and rows; all zero."""

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            input_ids=zeros(torch.int64, num_tokens),
            positions=zeros(torch.int64, num_tokens),
            slot_mapping=zeros(torch.int64, num_tokens),
            block_table=zeros(torch.int32, num_seqs, max_blocks),
            query_start_loc=zeros(torch.int32, num_seqs + 1),
            seq_lens=zeros(torch.int32, num_seqs),
            logit_indices=zeros(torch.int64, num_seqs),
        )

    def narrow(self, num_tokens: int, num_seqs: int, num_logits: int) -> DeviceStep:
        """The beginnings of buffers, as a step of this size has them."""
        return DeviceStep(
            self.input_ids[:num_tokens],
            self.positions[:num_tokens],
            self.slot_mapping[:num_tokens],
            self.block_table[:num_seqs],
            self.query_start_loc[: num_seqs + 1],
            self.seq_lens[:num_seqs],
            self.logit_indices[:num_logits],
        )


class StepInputs(Protocol):
    """Where a step's tensors are made: on the host, or on the device."""

    def pad_decodes(self, sizes: Sizes[int]) -> None:
        """From now on give steps in which every row has one token the next larger of these
        (ascending) sizes, if there is one: so all steps of a size read the tensors of
        `static_step(size)`. A padded row has length 0 and slot −1."""

    def static_step(self, size: int) -> DeviceStep:
        """The tensors of every padded step of `size` rows; as they are now, all rows sample."""

    def change_table(self, row: int, start: int) -> None:
        """From column `start` on, a row of `HostStep.tables` is not what it was."""

    def write(
        self, host: HostStep, token_ids: NDArray[np.int64], sampled: torch.Tensor
    ) -> DeviceStep:
        """The step's tensors. A negative id −1 − i stands for `sampled[i]`, on the device; only
        rows with one new token have such."""


def padded_size(host: HostStep, sizes: Sizes[int]) -> int | None:
    """The size that the step is padded to, if it is: see `StepInputs.pad_decodes`."""
    num_seqs = len(host.order)
    if host.max_query_len > 1 or num_seqs > max(sizes, default=0):
        return None
    return sizes[bisect_left(sizes, num_seqs)]


class HostInputs:
    """StepInputs on the CPU, whose memory is the device's."""

    def __init__(
        self, max_num_seqs: int, max_num_tokens: int, max_blocks: int, block_size: int
    ) -> None:
        self._block_size = block_size
        self._buffers = DeviceStep.allocate(
            max_num_tokens, max_num_seqs, max_blocks, torch.device("cpu")
        )
        self._table = torch.zeros(max_num_seqs * max_blocks, dtype=torch.int32)
        self._sizes: Sizes[int] = ()

    def pad_decodes(self, sizes: Sizes[int]) -> None:
        self._sizes = sizes
        self._buffers.slot_mapping[: max(sizes, default=0)] = -1  # they run once before any step

    def static_step(self, size: int) -> DeviceStep:
        return self._buffers.narrow(size, size, size)

    def change_table(self, row: int, start: int) -> None:
        """Tables are read in full."""

    def write(
        self, host: HostStep, token_ids: NDArray[np.int64], sampled: torch.Tensor
    ) -> DeviceStep:
        num_tokens, num_seqs = len(token_ids), len(host.order)
        ids, positions, slots, _, loc, seq_lens, logit_indices = (
            tensor.numpy() for tensor in self._buffers
        )
        ids[:num_tokens] = token_ids
        unknown = np.nonzero(token_ids[: host.num_decodes] < 0)[0]
        ids[unknown] = sampled.numpy()[-1 - token_ids[unknown]]
        loc[: num_seqs + 1] = host.query_start_loc
        seq_lens[:num_seqs] = host.seq_lens
        positions, slots = positions[:num_tokens], slots[:num_tokens]
        positions[:] = np.arange(num_tokens) + np.repeat(host.starts - loc[:num_seqs], host.lengths)
        blocks, offsets = np.divmod(positions, self._block_size)
        slots[:] = host.tables[np.repeat(host.rows, host.lengths), blocks]
        slots *= self._block_size
        slots += offsets
        num_logits = len(host.sampling_rows)
        logit_indices[:num_logits] = loc[host.sampling_rows + 1] - 1
        width = host.tables.shape[1]
        table = self._table[: num_seqs * width].view(num_seqs, width)
        np.take(host.tables, host.rows, axis=0, out=table.numpy())
        size = padded_size(host, self._sizes)
        if size is None:
            step = self._buffers.narrow(num_tokens, num_seqs, num_logits)
            return step._replace(block_table=table)
        step = self._buffers.narrow(size, size, num_logits)
        step.input_ids[num_seqs:] = 0
        step.slot_mapping[num_seqs:] = -1
        step.seq_lens[num_seqs:] = 0
        step.block_table[:num_seqs, :width] = table
        return step


class _Batch(NamedTuple):
    """What is the same in every step of the same sequences. `rows` are parallel to them."""

    seq_ids: list[int]
    sequences: list[SequenceSpec]
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
        device: torch.device,
    ) -> None:
        self._block_size = block_size
        self._rows: dict[int, int] = {}
        self._specs: dict[int, SequenceSpec] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._batch = _Batch([], [], np.empty(0, dtype=np.int64), False, False)
        # A last sampled token may own a slot without being fed back, hence one more.
        max_blocks = max_model_len // block_size + 1
        self._table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._sampled = torch.zeros(1, dtype=torch.int64, device=device)
        self._sampled_of: list[int] = []
        self.inputs: StepInputs
        if _has_kernel(device):
            from ..devices.cuda.inputs import DeviceInputs

            self.inputs = DeviceInputs(max_num_seqs, max_num_tokens, max_blocks, block_size, device)
        else:
            self.inputs = HostInputs(max_num_seqs, max_num_tokens, max_blocks, block_size)

    def apply(self, output: SchedulerOutput) -> None:
        """Bring rows and tables up to date with a plan."""
        for seq_id in output.released:
            del self._specs[seq_id]
            self._free_rows.append(self._rows.pop(seq_id))
        for spec in output.new_sequences:
            self._specs[spec.seq_id] = spec
            self._rows[spec.seq_id] = row = self._free_rows.pop()
            self._write_table(row, 0, spec.block_table)
        for seq_id, start, block_ids in output.table_changes:
            self._write_table(self._rows[seq_id], start, block_ids)
        if output.released or output.seq_ids != self._batch.seq_ids:
            sequences = [self._specs[seq_id] for seq_id in output.seq_ids]
            self._batch = _Batch(
                output.seq_ids,
                sequences,
                np.array([self._rows[seq_id] for seq_id in output.seq_ids], dtype=np.int64),
                any(one.pooling is not None for one in sequences),
                any(one.num_prompt_logprobs is not None for one in sequences),
            )

    def _write_table(self, row: int, start: int, block_ids: list[int]) -> None:
        self._table[row, start : start + len(block_ids)] = block_ids
        self.inputs.change_table(row, start)

    def keep_samples(self, seq_ids: list[int], token_ids: torch.Tensor) -> None:
        """Remember the tokens that a step sampled, `[R]` int64 on the device, for these sequences.

        The next step may have to compute one that the host does not know yet.
        """
        self._sampled_of, self._sampled = seq_ids, token_ids

    def prepare(self, output: SchedulerOutput) -> tuple[HostStep, DeviceStep]:
        """Lay out the step that `apply` was just called for."""
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
        if output.total_tokens > num_seqs:
            picks = np.argsort(counts > 1, kind="stable")
            token_ids = _reorder(token_ids, counts, picks)
            counts, starts, rows, samples = (
                counts[picks],
                starts[picks],
                rows[picks],
                samples[picks],
            )
            order = picks.tolist()
            sequences = [sequences[index] for index in order]
            num_decodes = int(np.count_nonzero(counts == 1))
        # 3. Which rows sample, which are pooled.
        pooled_rows = []
        if self._batch.any_pooled:
            pooled_rows = [row for row, one in enumerate(sequences) if one.pooling is not None]
            samples[pooled_rows] = False
        sampling_rows = np.nonzero(samples)[0]
        # 4. Tokens that the host does not know yet: −1 − i for the i-th of the last step's samples.
        unknown = np.nonzero(token_ids[:num_decodes] == UNKNOWN_TOKEN)[0].tolist()
        if unknown:
            token_ids[unknown] = self._places_in_samples(sequences[row].seq_id for row in unknown)
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
            sampled_positions=stops[sampling_rows].tolist(),
            pooled_rows=pooled_rows,
            any_scored=self._batch.any_scored,
            query_start_loc=loc,
            seq_lens=stops.astype(np.int32),
            rows=rows,
            tables=self._table[:, :width],
        )
        return host, self.inputs.write(host, token_ids, self._sampled)

    def _places_in_samples(self, seq_ids: Iterable[int]) -> list[int]:
        """Return −1 − i for the sequence whose token is the i-th of the last step's samples.

        A sequence whose row failed there gets token 0: its results will be dropped.
        """
        places = {seq_id: -1 - i for i, seq_id in enumerate(self._sampled_of)}
        return [places.get(seq_id, 0) for seq_id in seq_ids]


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


def _has_kernel(device: torch.device) -> bool:
    """Whether kernels/cuda/prepare_inputs.py makes the step's tensors."""
    return device.type == "cuda"
