"""The attention function that transformers calls: write K and V to their slots, then attend.

Everything it needs beside query, key and value comes in one argument, `attn_metadata`, which the
runner gives to the model and the model hands down to every layer; the layer's share of the KV
cache is found by `module.layer_idx`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface

if TYPE_CHECKING:
    from ...kernels.cuda.attention.cascade import CascadeWorkspace
    from ...kernels.cuda.attention.decode_schedule import DecodeWorkspace
    from ..devices.cpu.attention import CpuPlan

IMPLEMENTATION = "quire_paged"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """One step's layout: S sequences with T new tokens in all, decodes first.

    kv_cache         [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim]
    slot_mapping     [T] int64; block_id * block_size + offset, -1 writes nothing (padding)
    block_table      [S, max_blocks] int32
    query_start_loc  [S + 1] int32; sequence i's new tokens are [loc[i], loc[i + 1])
    seq_lens         [S] int32; tokens in the cache once this step's are written
    num_decodes      sequences with one new token; they are the first rows of every tensor
    max_query_len    most new tokens of any sequence
    workspaces       CUDA: the decode kernel's scratch by window, its schedule built for the step
    kv_scales        [num_layers, 2, num_kv_heads] float32: a float8 cache times them is K and V
    cascade          CUDA: the prefixes that decodes share, where reading them once saves time
    cpu_plan         CPU: the step's tiles, shared by all layers
    """

    kv_cache: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    num_decodes: int
    max_query_len: int
    workspaces: Mapping[int | None, DecodeWorkspace]
    kv_scales: torch.Tensor | None = None
    cascade: CascadeWorkspace | None = None
    cpu_plan: CpuPlan | None = None

    def scales_of(self, layer_idx: int) -> torch.Tensor | None:
        return None if self.kv_scales is None else self.kv_scales[layer_idx]


def register_attention() -> None:
    """Make `IMPLEMENTATION` known to transformers. It has no entry in the mask registry, so that
    models build no mask for it."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attn_metadata: AttentionMetadata,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query `[1, num_heads, T, head_dim]`, key and value `[1, num_kv_heads, T, head_dim]`, of any
    strides → `[1, T, num_heads, head_dim]`.

    `sliding_window` counts the token itself. `s_aux` `[num_heads]` are sink logits, which take
    part in the softmax and add nothing to the output. Other arguments were seen by the probe at
    load and change nothing here.
    """
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    kv_scales = attn_metadata.scales_of(layer_idx)
    options = {} if kv_scales is None else {"kv_scales": kv_scales}  # which the CPU never has
    output = _backend(query.device)(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        attn_metadata.kv_cache[layer_idx],
        attn_metadata,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        **options,
    )
    return output[None], None


def _backend(device: torch.device) -> Callable[..., torch.Tensor]:
    if device.type != "cpu":
        from ..devices.cuda.attention import attend_on_cuda

        return attend_on_cuda
    from ..devices.cpu.attention import attend_on_cpu

    return attend_on_cpu
