"""A step's tensors made on the CPU, by numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..steps import DeviceStep, HostStep

if TYPE_CHECKING:
    from numpy.typing import NDArray


class HostInputs:
    """StepInputs on the CPU, whose memory is the host's."""

    def __init__(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks: int,
        block_size: int,
        num_groups: int = 1,
    ) -> None:
        self._block_size = block_size
        self._num_groups = num_groups
        self._buffers = DeviceStep.allocate(
            max_num_tokens, max_num_seqs, max_blocks, torch.device("cpu"), num_groups
        )
        self._arrays = [tensor.numpy() for tensor in self._buffers]
        # These are packed anew in each step, so that kernels get arrays without gaps.
        self._slots = np.zeros(num_groups * max_num_tokens, dtype=np.int64)
        self._table = np.zeros(num_groups * max_num_seqs * max_blocks, dtype=np.int32)
        self._packed_rows: NDArray[np.int64] | None = None
        """The rows whose tables are packed now."""
        self._sizes = (0, 0, 0, 0)
        self._step = self._buffers

    def change_table(self, group: int, row: int, start: int) -> None:
        self._packed_rows = None

    def query_len(self, host: HostStep) -> int:
        """Return 1: nothing is padded."""
        return 1

    def mixed_size(self, host: HostStep) -> int:
        """Return 0: nothing is padded."""
        return 0

    def write(
        self, host: HostStep, token_ids: NDArray[np.int64], sampled: torch.Tensor
    ) -> DeviceStep:
        num_tokens, num_seqs, num_logits = len(token_ids), len(host.order), len(host.sampling_rows)
        ids, positions, _, _, loc, seq_lens, logit_indices = self._arrays
        # 1. The numbers of each row and of each token. Most steps have one token a row.
        ids[:num_tokens] = token_ids
        unknown = np.flatnonzero(token_ids[: host.num_decodes] < 0)
        if len(unknown):
            ids[unknown] = sampled.numpy()[-1 - token_ids[unknown]]
        loc[: num_seqs + 1] = host.query_start_loc
        seq_lens[:num_seqs] = host.seq_lens
        positions, logit_indices = positions[:num_tokens], logit_indices[:num_logits]
        rows = host.rows
        if host.max_query_len == 1:
            positions[:] = host.starts
            logit_indices[:] = host.sampling_rows
        else:
            shifts = np.repeat(host.starts - loc[:num_seqs], host.lengths)
            positions[:] = np.arange(num_tokens) + shifts
            rows = np.repeat(rows, host.lengths)
            logit_indices[:] = loc[host.sampling_rows + 1] - 1
        if host.num_drafts:
            before_end = host.seq_lens[host.sampling_rows] - np.array(host.sampled_positions)
            logit_indices -= before_end
        # 2. The block tables in the order of the batch, packed: as long as nobody changes them,
        #    they are those of the last step. So are the tensors, which are views.
        sizes = (num_tokens, num_seqs, num_logits, host.tables.shape[2])
        if sizes != self._sizes or host.rows is not self._packed_rows:
            self._pack(host, sizes)
        # 3. Each token's slot, through its row's block table.
        blocks, offsets = np.divmod(positions, self._block_size)
        slot_mapping = self._step.slot_mapping.numpy()
        for table, slots in zip(host.tables, slot_mapping, strict=True):
            slots[:] = table[rows, blocks]
        slot_mapping *= self._block_size
        slot_mapping += offsets
        return self._step

    def _pack(self, host: HostStep, sizes: tuple[int, int, int, int]) -> None:
        """Pack the tables of a step of `sizes` tokens, rows, logits, and blocks a row, and make its
        tensors."""
        num_tokens, num_seqs, num_logits, width = sizes
        groups = self._num_groups
        tables = self._table[: groups * num_seqs * width].reshape(groups, num_seqs, width)
        for held, packed in zip(host.tables, tables, strict=True):
            np.take(held, host.rows, axis=0, out=packed)
        self._packed_rows, self._sizes = host.rows, sizes
        slots = self._slots[: groups * num_tokens].reshape(groups, num_tokens)
        self._step = self._buffers.narrow(num_tokens, num_seqs, num_logits)._replace(
            slot_mapping=torch.from_numpy(slots), block_table=torch.from_numpy(tables)
        )
