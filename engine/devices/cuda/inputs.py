"""A step's tensors made on CUDA: one copy of what the host alone knows, one kernel.

Importing this loads Triton: only a worker on CUDA does.
"""

from __future__ import annotations

from collections.abc import Sequence as Sizes
from typing import TYPE_CHECKING

import numpy as np
import torch

from ....kernels.cuda.prepare_inputs import FIELDS, Record, prepare_inputs
from ...runner.input_batch import DeviceStep, HostStep, padded_size

if TYPE_CHECKING:
    from numpy.typing import NDArray


class DeviceInputs:
    """StepInputs whose block tables stay on the device, a row for each running sequence."""

    def __init__(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._block_size = block_size
        self._buffers = DeviceStep.allocate(max_num_tokens, max_num_seqs, max_blocks, device)
        self._table = torch.zeros_like(self._buffers.block_table)
        self._known = np.zeros(max_num_seqs, dtype=np.int64)
        """The leading columns of each row that are on the device what they are on the host."""
        self._sizes: Sizes[int] = ()
        capacity = max_num_seqs * (FIELDS + max_blocks) + max_num_tokens
        # One buffer, whose last copy is waited for before the next is written. That copy stands
        # first in its step, and the results of the step before are in by then: there is next to
        # nothing to wait for. A second buffer in turn would need the same event to be safe, and as
        # much pinned memory again.
        self._packed = torch.zeros(capacity, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._on_device = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._uploaded: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def pad_decodes(self, sizes: Sizes[int]) -> None:
        self._sizes = sizes
        if sizes:  # static steps run once before there is any: as steps of nothing but padding
            nothing = self._on_device[:0]
            self._launch(nothing, nothing.long(), self.static_step(max(sizes)), 0, 0)

    def static_step(self, size: int) -> DeviceStep:
        return self._buffers.narrow(size, size, size)

    def change_table(self, row: int, start: int) -> None:
        self._known[row] = min(self._known[row], start)

    def write(
        self, host: HostStep, token_ids: NDArray[np.int64], sampled: torch.Tensor
    ) -> DeviceStep:
        if self._uploaded is not None:
            self._uploaded.synchronize()
        length = self._pack(host, token_ids)
        packed = self._on_device[:length].copy_(self._packed[:length], non_blocking=True)
        if self._uploaded is not None:
            self._uploaded.record()
        num_seqs, size = len(host.order), padded_size(host, self._sizes)
        size = num_seqs if size is None else size
        num_tokens = len(token_ids) + size - num_seqs
        step = self._buffers.narrow(num_tokens, size, len(host.sampling_rows))
        reach = max(host.max_query_len, host.tables.shape[1])
        self._launch(packed, sampled, step, num_seqs, reach)
        return step

    def _pack(self, host: HostStep, token_ids: NDArray[np.int64]) -> int:
        """Fill the pinned buffer; how many numbers it holds. From now on the device counts as
        knowing what they say: steps run in the order of their launch."""
        num_seqs, decodes, packed = len(host.order), host.num_decodes, self._packed.numpy()
        ids_at = num_seqs * FIELDS
        blocks_at = ids_at + len(token_ids) - decodes
        packed[ids_at:blocks_at] = token_ids[decodes:]
        used = -(-host.seq_lens // self._block_size)
        known = np.minimum(self._known[host.rows], used)
        counts = used - known
        blocks = blocks_at + np.cumsum(counts) - counts
        for i in np.nonzero(counts)[0].tolist():
            row = host.tables[host.rows[i], known[i] : used[i]]
            packed[blocks[i] : blocks[i] + len(row)] = row
        self._known[host.rows] = np.maximum(self._known[host.rows], used)
        loc = host.query_start_loc[:-1]
        sample = np.full(num_seqs, -1)
        sample[host.sampling_rows] = np.arange(len(host.sampling_rows))
        record = Record(
            row=host.rows,
            start=host.starts,
            length=host.lengths,
            first=loc,
            token=np.concatenate([token_ids[:decodes], ids_at - decodes + loc[decodes:]]),
            known=known,
            blocks=blocks,
            sample=sample,
        )
        packed[:ids_at].reshape(num_seqs, FIELDS)[:] = np.stack(record, axis=1)
        return int(blocks_at + counts.sum())

    def _launch(
        self,
        packed: torch.Tensor,
        sampled: torch.Tensor,
        step: DeviceStep,
        num_seqs: int,
        reach: int,
    ) -> None:
        prepare_inputs(
            packed,
            sampled,
            self._table,
            *step[:-1],
            self._buffers.logit_indices,
            num_seqs=num_seqs,
            reach=reach,
            block_size=self._block_size,
        )
