"""A step's tensors made on CUDA: one copy of what only the host knows, then one kernel.

The tensors' addresses never change, because CUDA graphs read them in place. Importing this loads
Triton.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import abc
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ....kernels.cuda.prepare_inputs import FIELDS, Record
from ....kernels.device_copy import StagingBuffer
from ..steps import DeviceStep, GraphKey, HostStep
from .layers.kernels import Kernels
from .mixed_graphs import max_prompts

if TYPE_CHECKING:
    from numpy.typing import NDArray


class DeviceInputs:
    """StepInputs whose block tables stay on the device, in each group of layers a row for each
    running sequence: that of row r in group g is row g · max_num_seqs + r."""

    def __init__(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        kernels: Kernels,
        num_groups: int = 1,
    ) -> None:
        self._block_size = block_size
        self._prepare_inputs = kernels.prepare_inputs
        # One row more, for the padding of mixed steps.
        self._buffers = DeviceStep.allocate(
            max_num_tokens, max_num_seqs + 1, max_blocks, device, num_groups
        )
        self._table = torch.zeros_like(self._buffers.block_table).flatten(0, 1)
        self.num_decodes = torch.zeros(1, dtype=torch.int32, device=device)
        """The number of decodes in a padded mixed step, on the device."""
        self._known = np.zeros((num_groups, max_num_seqs), dtype=np.int64)
        """How many leading columns of each row are the same on the device as on the host."""
        self._sizes: abc.Sequence[int] = ()
        self._draft_sizes: abc.Sequence[int] = ()
        self._query_len = 1
        self._mixed_sizes: abc.Sequence[int] = ()
        capacity = num_groups * max_num_seqs * (FIELDS + max_blocks) + max_num_tokens
        # One buffer suffices. It is written once its last copy has been made, and that copy comes
        # first in its step, whose predecessor's results are in by then: there is next to nothing
        # to wait for. A second buffer in turn would need the same event to be safe, and as much
        # pinned memory again.
        self._packed = StagingBuffer(capacity, torch.int32, device)

    @property
    def max_num_tokens(self) -> int:
        """Maximum number of tokens of a step, padding included."""
        return len(self._buffers.input_ids)

    def pad_decodes(self, sizes: abc.Sequence[int]) -> None:
        """From now on, pad steps in which every row has one token to the next larger of these
        ascending sizes, if there is one.

        All steps of a size then read the tensors of `static_step(size)`. A padded row has length
        0 and slot −1.
        """
        self._sizes = sizes
        if sizes:  # static steps run once before there is any: as steps of nothing but padding
            nothing = self._packed.send(0)
            self._launch(nothing, nothing.long(), self.static_step(max(sizes)), 0, 0)

    def pad_drafts(self, sizes: abc.Sequence[int], query_len: int) -> None:
        """From now on, pad steps with drafts to `query_len` tokens in each row and to the next
        larger of these ascending numbers of rows, if they fit.

        All steps of a size then read the tensors of `static_step(size, query_len)`.
        """
        self._draft_sizes, self._query_len = sizes, query_len
        if sizes:
            nothing, step = self._packed.send(0), self.static_step(max(sizes), query_len)
            self._launch(nothing, nothing.long(), step, 0, 0, query_len)

    def pad_mixed(self, sizes: abc.Sequence[int]) -> None:
        """From now on, pad steps that have rows of several tokens to the next larger of these
        ascending numbers of tokens, if they fit. (Those of `pad_drafts` have no such rows.)

        All steps of a size then read the tensors of `mixed_step(size)`, whose rows mixed_graphs.py
        describes.
        """
        self._mixed_sizes = sizes
        if sizes:
            nothing, step = self._packed.send(0), self.mixed_step(max(sizes))
            self._launch(nothing, nothing.long(), step, 0, max(sizes), mixed=(0, 0))

    def step_of(self, key: GraphKey) -> DeviceStep:
        """Return the tensors of every step of this kind."""
        return self.mixed_step(key.size) if key.mixed else self.static_step(key.size, key.query_len)

    def mixed_step(self, size: int) -> DeviceStep:
        """Return the tensors of every padded mixed step of so many tokens, without samples."""
        num_seqs = len(self._buffers.seq_lens)  # with the row of the padding
        return self._buffers.narrow(size, min(num_seqs, size), 0)

    def mixed_size(self, host: HostStep) -> int:
        num_tokens, prompts = int(host.query_start_loc[-1]), len(host.order) - host.num_decodes
        if not prompts or num_tokens > max(self._mixed_sizes, default=0):
            return 0
        size = self._mixed_sizes[bisect_left(self._mixed_sizes, num_tokens)]
        return size if prompts <= max_prompts(size) else 0

    def static_step(self, size: int, query_len: int = 1) -> DeviceStep:
        """Return the tensors of every padded step of `size` rows with so many tokens each, as if
        all of these sampled."""
        num_tokens = size * query_len
        return self._buffers.narrow(num_tokens, size, num_tokens)

    def query_len(self, host: HostStep) -> int:
        fits = (
            host.token_slots is None  # those of adapters are by token, without padding
            and host.max_query_len <= self._query_len
            and len(host.order) <= max(self._draft_sizes, default=0)
            # A padded token must not read past the end of its row of the block table.
            and int(host.starts.max()) + self._query_len <= self._table.shape[1] * self._block_size
        )
        return self._query_len if fits else 1

    def change_table(self, group: int, row: int, start: int) -> None:
        self._known[group, row] = min(self._known[group, row], start)

    def write(
        self, host: HostStep, token_ids: NDArray[np.int64], sampled: torch.Tensor
    ) -> DeviceStep:
        num_seqs, num_logits = len(host.order), len(host.sampling_rows)
        query_len = self.query_len(host) if host.num_drafts else 1
        length = self._pack(self._packed.open(), host, token_ids, query_len)
        packed = self._packed.send(length)
        reach = max(host.max_query_len, host.tables.shape[2])
        if query_len == 1 and (size := self.mixed_size(host)):
            step = self.mixed_step(size)._replace(
                logit_indices=self._buffers.logit_indices[:num_logits]
            )
            reach = max(reach, size - len(token_ids))
            mixed = (len(token_ids), host.num_decodes)
            self._launch(packed, sampled, step, num_seqs, reach, mixed=mixed)
            return step
        size = self._padded_size(host, query_len)
        num_tokens = len(token_ids) + size - num_seqs if query_len == 1 else size * query_len
        step = self._buffers.narrow(num_tokens, size, num_logits)
        self._launch(packed, sampled, step, num_seqs, reach, query_len)
        return step

    def _padded_size(self, host: HostStep, query_len: int) -> int:
        """Return the number of the step's rows, with padding if it is padded."""
        num_seqs = len(host.order)
        if query_len > 1:
            return self._draft_sizes[bisect_left(self._draft_sizes, num_seqs)]
        if host.max_query_len > 1 or num_seqs > max(self._sizes, default=0):
            return num_seqs
        return self._sizes[bisect_left(self._sizes, num_seqs)]

    def _pack(
        self,
        packed: np.ndarray[Any, Any],
        host: HostStep,
        token_ids: NDArray[np.int64],
        query_len: int,
    ) -> int:
        """Fill the pinned buffer and return how many numbers it holds.

        Marks the packed table entries as known to the device, since steps run in launch order.
        """
        # 1. Reserve records for each row, followed by the token ids of rows with several.
        num_seqs, decodes = len(host.order), host.num_decodes
        num_groups, max_num_seqs = self._known.shape
        ids_at = num_groups * num_seqs * FIELDS
        end = ids_at + len(token_ids) - decodes
        packed[ids_at:end] = token_ids[decodes:]
        used = -(-host.seq_lens // self._block_size)
        loc = host.query_start_loc[:-1]
        num_samples = np.bincount(host.sampling_rows, minlength=num_seqs)
        token = np.concatenate([token_ids[:decodes], ids_at - decodes + loc[decodes:]])
        records = packed[:ids_at].reshape(num_groups, num_seqs, FIELDS)
        for group, held in enumerate(self._known):
            # 2. Append the table entries that the device does not know yet.
            known = np.minimum(held[host.rows], used)
            counts = used - known
            blocks = end + np.cumsum(counts) - counts
            for i in np.nonzero(counts)[0].tolist():
                row = host.tables[group, host.rows[i], known[i] : used[i]]
                packed[blocks[i] : blocks[i] + len(row)] = row
            held[host.rows] = np.maximum(held[host.rows], used)
            end += int(counts.sum())
            # 3. Fill the records, which say where each row's ids and entries are.
            record = Record(
                row=group * max_num_seqs + host.rows,
                start=host.starts,
                length=host.lengths,
                first=loc if query_len == 1 else query_len * np.arange(num_seqs),
                token=token,
                known=known,
                blocks=blocks,
                sample=np.cumsum(num_samples) - num_samples,
                num_samples=num_samples,
            )
            records[group] = np.stack(record, axis=1)
        return end

    def _launch(
        self,
        packed: torch.Tensor,
        sampled: torch.Tensor,
        step: DeviceStep,
        num_seqs: int,
        reach: int,
        query_len: int = 1,
        mixed: tuple[int, int] | None = None,
    ) -> None:
        """Launch the kernel; `mixed` are the tokens and the decodes of a padded mixed step."""
        options: dict[str, Any] = {}
        if mixed is not None:
            num_tokens, num_decodes = mixed
            options = {"num_tokens": num_tokens, "num_decodes": num_decodes}
            options["num_decodes_out"] = self.num_decodes
        self._prepare_inputs(
            packed,
            sampled,
            self._table,
            *step[:-1],
            self._buffers.logit_indices,
            num_seqs=num_seqs,
            reach=reach,
            block_size=self._block_size,
            query_len=query_len,
            **options,
        )
