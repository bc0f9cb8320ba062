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

    def change_table(self, group: int, row: int, start: int) -> None:
        """Do nothing: `write` reads tables in full."""

    def query_len(self, host: HostStep) -> int:
        """Return 1: nothing is padded."""
        return 1

    def mixed_size(self, host: HostStep) -> int:
        """Return 0: nothing is padded."""
        return 0

    def write(
        self, host: HostStep, token_ids: NDArray[np.int64], sampled: torch.Tensor
    ) -> DeviceStep:
        num_tokens, num_seqs, groups = len(token_ids), len(host.order), self._num_groups
        ids, positions, _, _, loc, seq_lens, logit_indices = self._arrays
        # 1. The numbers of each row and of each token.
        ids[:num_tokens] = token_ids
        unknown = np.nonzero(token_ids[: host.num_decodes] < 0)[0]
        ids[unknown] = sampled.numpy()[-1 - token_ids[unknown]]
        loc[: num_seqs + 1] = host.query_start_loc
        seq_lens[:num_seqs] = host.seq_lens
        positions = positions[:num_tokens]
        positions[:] = np.arange(num_tokens) + np.repeat(host.starts - loc[:num_seqs], host.lengths)
        # 2. Each token's slot, through its row's block table.
        blocks, offsets = np.divmod(positions, self._block_size)
        slot_mapping = self._slots[: groups * num_tokens].reshape(groups, num_tokens)
        rows = np.repeat(host.rows, host.lengths)
        for table, slots in zip(host.tables, slot_mapping, strict=True):
            slots[:] = table[rows, blocks]
        slot_mapping *= self._block_size
        slot_mapping += offsets
        num_logits = len(host.sampling_rows)
        logit_indices[:num_logits] = loc[host.sampling_rows + 1] - 1
        if host.num_drafts:
            before_end = host.seq_lens[host.sampling_rows] - np.array(host.sampled_positions)
            logit_indices[:num_logits] -= before_end
        # 3. The block tables in the order of the batch, packed.
        width = host.tables.shape[2]
        tables = self._table[: groups * num_seqs * width].reshape(groups, num_seqs, width)
        for held, packed in zip(host.tables, tables, strict=True):
            np.take(held, host.rows, axis=0, out=packed)
        step = self._buffers.narrow(num_tokens, num_seqs, num_logits)
        return step._replace(
            slot_mapping=torch.from_numpy(slot_mapping), block_table=torch.from_numpy(tables)
        )
