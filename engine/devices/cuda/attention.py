"""Attention on CUDA: plan a step, then attend in every layer with two or three launches at most.

Everything that changes from step to step is in tensors at fixed addresses, so that a CUDA graph
can capture all of it. Importing this loads Triton.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ....kernels.cuda.attention.cascade import CascadeWorkspace
from ....kernels.cuda.attention.decode_schedule import DecodeWorkspace
from ...attention.metadata import AttentionMetadata
from ...layers.attention_shape import AttentionShape
from ..steps import DeviceStep, HostStep
from .layers.kernels import Kernels
from .mixed_graphs import max_prompts
from .shared_prefixes import SharedPrefixes

if TYPE_CHECKING:
    from numpy.typing import NDArray


class MixedRows(NamedTuple):
    """How many rows of a padded mixed step are decodes, `[1]` int32 on the device, how many of them
    there can be at most, and how many rows of several tokens, the padding's included."""

    num_decodes: torch.Tensor
    max_decodes: int
    max_prompts: int


Workspaces = Mapping[AttentionShape, DecodeWorkspace]
"""The decode kernel's scratch, by the shape in which layers attend."""


class CudaPlan(NamedTuple):
    """The AttentionPlan of one step.

    `workspaces` are the decode kernel's scratch, with the schedule built for the step. `cascade`
    has the prefixes that decodes share, if reading them once saves time. Each decode row has
    `query_len` tokens. `mixed` is given if only the device knows which rows are decodes.
    """

    kernels: Kernels
    workspaces: Workspaces
    cascade: CascadeWorkspace | None
    query_len: int = 1
    mixed: MixedRows | None = None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        kv_scales: torch.Tensor | None,
    ) -> torch.Tensor:
        key_cache, value_cache = cache
        self.kernels.reshape_and_cache(
            key, value, key_cache, value_cache, metadata.slot_mapping, kv_scales=kv_scales
        )
        return self.attend_to_cache(
            query,
            cache,
            metadata,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            kv_scales=kv_scales,
        )

    def attend_latents(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        cache: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        value_width: int,
    ) -> torch.Tensor:
        (key_cache,) = cache
        self.kernels.reshape_and_cache(
            latents[:, None], None, key_cache, None, metadata.slot_mapping, value_width=value_width
        )
        return self.attend_to_cache(
            query, cache, metadata, scale=scale, window=None, value_width=value_width
        )

    # Over 50 lines: two launches of a dozen arguments.
    def attend_to_cache(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        window: int | None,
        value_width: int | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Attend once K and V are in the cache; `options` are those of both attention kernels.

        Takes one launch for the decode rows, one more if they share prefixes, and one for the
        rows with more tokens. A cache of latents has keys only, and a `value_width`.
        """
        key_cache, value_cache = cache if value_width is None else (cache[0], None)
        _, num_heads, head_dim = query.shape
        output = query.new_empty(*query.shape[:2], value_width or head_dim)
        # The decode kernel takes the first rows; in a mixed step, those that its schedule names.
        decodes, first, longest = metadata.num_decodes, metadata.num_decodes, metadata.max_query_len
        of_mixed: dict[str, Any] = {}
        if self.mixed is not None:
            decodes, first, longest = self.mixed.max_decodes, 0, len(query)
            num_decodes, _, max_seqs = self.mixed
            of_mixed = {"first_seq": num_decodes, "max_seqs": max_seqs}
        tokens = decodes * self.query_len
        if decodes > 0:
            shape = AttentionShape(num_heads, key_cache.shape[1], head_dim, window, value_width)
            self.kernels.paged_attention_decode(
                query[:tokens],
                key_cache,
                value_cache,
                metadata.block_table[:decodes],
                metadata.seq_lens[:decodes],
                window=window,
                value_width=value_width,
                workspace=self.workspaces[shape],
                cascade=self.cascade if window is None else None,
                out=output[:tokens],
                **options,
            )
        if longest > 1:
            # query_start_loc of the remaining rows still counts from the batch's first token.
            self.kernels.paged_attention_extend(
                query,
                key_cache,
                value_cache,
                metadata.block_table[first:],
                metadata.query_start_loc[first:],
                metadata.seq_lens[first:],
                max_query_len=longest,
                window=window,
                value_width=value_width,
                out=output,
                **of_mixed,
                **options,
            )
        return output


class CudaPlanner:
    """Planner of the steps over one KV cache."""

    def __init__(
        self,
        kernels: Kernels,
        workspaces: Workspaces,
        shared_prefixes: SharedPrefixes | None,
        draft_workspaces: Workspaces | None = None,
    ) -> None:
        """`draft_workspaces` are for steps with drafts that are padded, which can be planned only
        with them."""
        self._kernels = kernels
        self._workspaces = workspaces
        self._draft_workspaces = draft_workspaces
        self.shared_prefixes = shared_prefixes

    @property
    def query_len(self) -> int:
        """See `Planner`."""
        workspaces = (self._draft_workspaces or {}).values()
        return max((one.query_len for one in workspaces), default=1)

    def find_shared(self, host: HostStep) -> bool:
        if self.shared_prefixes is None:
            return False
        decodes = host.num_decodes
        return self.shared_prefixes.find(
            list(host.tables[0, host.rows[:decodes]]), host.seq_lens[:decodes].tolist()
        )

    def plan(
        self,
        query_start_loc: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
        num_decodes: int,
        step: DeviceStep,
        *,
        shared: bool = False,
        query_len: int = 1,
    ) -> CudaPlan:
        if query_len > 1:
            return self.plan_drafts(step.seq_lens, query_len)
        return self.plan_decodes(step.seq_lens[:num_decodes], shared=shared)

    def plan_drafts(self, seq_lens: torch.Tensor, query_len: int) -> CudaPlan:
        """Plan rows with `query_len` tokens each, of these lengths `[S]` with them."""
        assert self._draft_workspaces is not None
        for workspace in self._draft_workspaces.values():
            self._kernels.build_decode_schedule(seq_lens, workspace, prefix_lens=None)
        return CudaPlan(self._kernels, self._draft_workspaces, None, query_len)

    def plan_mixed(self, step: DeviceStep, num_decodes: torch.Tensor) -> CudaPlan:
        """Plan a padded mixed step, whose `num_decodes` `[1]` only the device knows."""
        size, max_decodes = len(step.input_ids), len(step.seq_lens) - 1
        seq_lens = step.seq_lens[:max_decodes]
        for workspace in self._workspaces.values():
            self._kernels.build_decode_schedule(
                seq_lens, workspace, prefix_lens=None, num_decodes=num_decodes
            )
        rows = MixedRows(num_decodes, max_decodes, 1 + max_prompts(size))
        return CudaPlan(self._kernels, self._workspaces, None, mixed=rows)

    def plan_decodes(self, seq_lens: torch.Tensor, *, shared: bool) -> CudaPlan:
        """Plan decode rows of these lengths `[num_decodes]`, on the device.

        This builds the decode kernel's schedules, which assign keys to programs. Rows with more
        tokens need none.
        """
        cascade = None
        if shared:
            assert self.shared_prefixes is not None
            cascade = self.shared_prefixes.workspace
        if len(seq_lens):
            for shape, workspace in self._workspaces.items():
                groups = cascade if shape.window is None else None
                self._kernels.build_decode_schedule(
                    seq_lens, workspace, prefix_lens=None if groups is None else groups.prefix_lens
                )
        return CudaPlan(self._kernels, self._workspaces, cascade)


def allocate_workspaces(
    shapes: Iterable[AttentionShape],
    max_num_seqs: int,
    dtype: torch.dtype,
    device: torch.device,
    query_len: int = 1,
) -> dict[AttentionShape, DecodeWorkspace]:
    """Allocate the decode kernel's scratch for queries of `dtype`, by shape."""
    return {
        shape: DecodeWorkspace.allocate(
            max_num_seqs,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            dtype=dtype,
            device=device,
            window=shape.window,
            query_len=query_len,
            value_width=shape.value_width,
        )
        for shape in shapes
    }
