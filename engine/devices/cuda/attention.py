"""Attention and a flat body's other operations on CUDA: a layer as a row of Triton launches.

What changes from step to step lies in tensors at fixed addresses, so that a graph can hold all of
it. Importing this loads Triton: only a worker on CUDA does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ....kernels.cuda.attention.cascade import CascadeWorkspace
from ....kernels.cuda.attention.decode_schedule import DecodeWorkspace, build_decode_schedule
from ....kernels.cuda.attention.paged_attention_decode import paged_attention_decode
from ....kernels.cuda.attention.paged_attention_extend import paged_attention_extend
from ....kernels.cuda.reshape_and_cache import reshape_and_cache
from ....kernels.cuda.rms_norm import fused_add_rms_norm, rms_norm
from ....kernels.cuda.rope_and_cache import rope_and_cache
from ....kernels.cuda.silu_and_mul import silu_and_mul
from ....kernels.prefix_groups import PrefixGroup, find_prefix_groups

if TYPE_CHECKING:
    from ...attention.interface import AttentionMetadata
    from ...body.flat_decoder import FlatLayer, Norm, Rotation
    from ...model.model_spec import ModelSpec
    from ...runner.input_batch import HostStep

logger = logging.getLogger("quire.engine")


def attend_on_cuda(
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
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """query `[T, num_heads, head_dim]`, key and value `[T, num_kv_heads, head_dim]` → like query.

    The cache is one layer's `[2, num_blocks, num_kv_heads, block_size, head_dim]`, kv_scales its
    `[2, num_kv_heads]` where it is float8.
    """
    key_cache, value_cache = cache
    reshape_and_cache(
        key, value, key_cache, value_cache, metadata.slot_mapping, kv_scales=kv_scales
    )
    return _attend(
        query,
        cache,
        metadata,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        kv_scales=kv_scales,
    )


def _attend(
    query: torch.Tensor,
    cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    window: int | None,
    **options: Any,
) -> torch.Tensor:
    """Two launches at most, a shared prefix's aside: decode rows, then rows with more tokens."""
    key_cache, value_cache = cache
    output = query.new_empty(query.shape)
    decodes = metadata.num_decodes
    if decodes > 0:
        paged_attention_decode(
            query[:decodes],
            key_cache,
            value_cache,
            metadata.block_table[:decodes],
            metadata.seq_lens[:decodes],
            window=window,
            workspace=metadata.workspaces[window],
            cascade=metadata.cascade if window is None else None,
            out=output[:decodes],
            **options,
        )
    if metadata.max_query_len > 1:
        # query_start_loc of the remaining rows still counts from the whole batch's first token.
        paged_attention_extend(
            query,
            key_cache,
            value_cache,
            metadata.block_table[decodes:],
            metadata.query_start_loc[decodes:],
            metadata.seq_lens[decodes:],
            max_query_len=metadata.max_query_len,
            window=window,
            out=output,
            **options,
        )
    return output


class CudaOps(NamedTuple):
    """BodyOps of one step over `metadata`, each a launch, attention's three at most aside."""

    metadata: AttentionMetadata

    def add_norm(self, x: torch.Tensor, update: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        if update is None:
            return rms_norm(x, norm.weight, eps=norm.eps)
        fused_add_rms_norm(update, x, norm.weight, eps=norm.eps)
        return update

    def attend(self, layer: FlatLayer, qkv: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        metadata = self.metadata
        cache, kv_scales = metadata.kv_cache[layer.layer_idx], metadata.scales_of(layer.layer_idx)
        key_cache, value_cache = cache
        sizes = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
        query, key, value = torch.split(qkv.view(len(qkv), -1, layer.head_dim), sizes, dim=1)
        norms: dict[str, Any] = {}
        if layer.qk_norm is not None:
            weight, eps = layer.qk_norm
            norms = {"query_weight": weight[0], "key_weight": weight[-1], "eps": eps}
        half = layer.head_dim // 2  # whose sines are negated in a rotation's first half
        rope_and_cache(
            query,
            key,
            value,
            key_cache,
            value_cache,
            metadata.slot_mapping,
            rotation.cos[:, half:],
            rotation.sin[:, half:],
            **norms,
            rotary_dim=layer.head_dim,
            out=query,
            kv_scales=kv_scales,
        )
        attended = _attend(
            query,
            cache,
            metadata,
            scale=layer.scale,
            window=layer.window,
            kv_scales=kv_scales,
        )
        return attended.view(len(qkv), -1)

    def activate(self, layer: FlatLayer, gate_up: torch.Tensor) -> torch.Tensor:
        if layer.is_silu:
            return silu_and_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return layer.activation(gate) * up


def allocate_workspaces(
    spec: ModelSpec,
    windows: Iterable[int | None],
    max_num_seqs: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[int | None, DecodeWorkspace]:
    """The decode kernel's scratch for queries of `dtype`, by window."""
    shape = (max_num_seqs, spec.num_attention_heads, spec.num_kv_heads, spec.head_dim)
    return {
        window: DecodeWorkspace.allocate(*shape, dtype=dtype, device=device, window=window)
        for window in windows
    }


def schedule_decodes(
    seq_lens: torch.Tensor,
    workspaces: Mapping[int | None, DecodeWorkspace],
    cascade: CascadeWorkspace | None,
) -> None:
    """Once a step, before its layers: which program of the decode kernel reads which keys."""
    for window, workspace in workspaces.items():
        groups = cascade if window is None else None
        build_decode_schedule(
            seq_lens, workspace, prefix_lens=None if groups is None else groups.prefix_lens
        )


class SharedPrefixes:
    """Which rows of a decode batch have their common beginning read once for all of them.

    Found anew in every step from the block tables, whose blocks are the same where the scheduler
    shares them, whatever made it: the prefix cache, a fork, a beam.
    """

    def __init__(self, workspace: CascadeWorkspace, block_size: int) -> None:
        self.workspace = workspace
        self._block_size = block_size
        self._groups: list[PrefixGroup] = []

    @classmethod
    def allocate(
        cls,
        workspaces: Mapping[int | None, DecodeWorkspace],
        block_size: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> SharedPrefixes | None:
        """None where every layer has a window, or a sequence's heads overfill a tile."""
        if None not in workspaces:
            return None
        try:
            workspace = CascadeWorkspace.allocate(
                workspaces[None], dtype=dtype, cache_dtype=cache_dtype
            )
        except ValueError as error:
            logger.info("decode steps read shared prefixes apart: %s", error)
            return None
        return cls(workspace, block_size)

    def find(self, host: HostStep) -> CascadeWorkspace | None:
        """The workspace, which serves the groups of this step's decodes from now on; None where
        they save less than the launch costs."""
        decodes, workspace = host.num_decodes, self.workspace
        groups = find_prefix_groups(
            list(host.tables[host.rows[:decodes]]),
            host.seq_lens[:decodes].tolist(),
            self._block_size,
            workspace.cost,
            tile=workspace.tile,
        )
        if not groups:
            return None
        if groups != self._groups:
            workspace.set_groups(groups)
            self._groups = groups
        return workspace
