"""What every layer's attention needs to know about a step."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..states.step_states import StepStates


class AttentionPlan(Protocol):
    """How one step attends on its device.

    A device's planner makes it once a step; only code of the same device looks inside.
    """

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
        """Write K and V to their slots, then attend.

        query `[T, num_heads, head_dim]`, key and value `[T, num_kv_heads, head_dim]` → like query.
        cache is one layer's `[2, num_blocks, num_kv_heads, block_size, head_dim]`, kv_scales its
        `[2, num_kv_heads]` if it is float8. `window` counts the token itself; -c stands for chunks
        of c tokens (engine/layers). `sinks` `[num_heads]` are logits that take part in the softmax
        and add nothing to the output.
        """

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
        """Write latents to their slots, then attend with all heads to one KV head, whose values are
        the first `value_width` numbers of its keys.

        query `[T, num_heads, width]`, latents `[T, width]` → `[T, num_heads, value_width]`. cache
        is one layer's `[1, num_blocks, 1, block_size, width]`.
        """


class LayerStep(NamedTuple):
    """What one layer's attention needs to know about a step: the metadata of the layer's group, the
    layer's part of the cache, and its `[2, num_kv_heads]` scales, if the cache has any."""

    metadata: AttentionMetadata
    cache: torch.Tensor
    kv_scales: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """One step's layout: S sequences with T new tokens in all, decodes first.

    kv_cache         [num_places, 2, num_blocks, num_kv_heads, block_size, head_dim]; a place for
                     each layer, or for each layer of the largest group. Of latents there is 1
                     part, not 2
    slot_mapping     [T] int64; block_id * block_size + offset, -1 writes nothing (padding)
    block_table      [S, max_blocks] int32
    query_start_loc  [S + 1] int32; sequence i's new tokens are [loc[i], loc[i + 1])
    seq_lens         [S] int32; tokens in the cache once this step's are written
    num_decodes      sequences with one new token; they are the first rows of every tensor
    max_query_len    maximum number of new tokens of a sequence
    plan             how the device attends in this step; opaque to everything but that device
    states           those of the layers that keep a state, if there are any
    kv_scales        [num_layers, 2, num_kv_heads] float32: a float8 cache times them is K and V
    others           the metadata of the second and all further groups of layers, if layers have
                     several groups, each with slots and block tables of its own
    places           for each layer the group and the place of its K and V, of each of their parts
                     if there are several; None if there is one group, and a place a layer
    positions        [T] int64; the position of each token in its sequence
    """

    kv_cache: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    num_decodes: int
    max_query_len: int
    plan: AttentionPlan
    kv_scales: torch.Tensor | None = None
    states: StepStates | None = None
    others: tuple[AttentionMetadata, ...] = ()
    places: abc.Sequence[tuple[tuple[int, int], ...]] | None = None
    positions: torch.Tensor | None = None

    def of_layer(self, layer_idx: int) -> LayerStep:
        """Return what a layer's attention needs to know, if K and V are in one place. Called on the
        first group's metadata."""
        (step,) = self.parts_of(layer_idx)
        return step

    def parts_of(self, layer_idx: int) -> list[LayerStep]:
        """Return what a layer's attention needs to know for each part of its heads."""
        scales = None if self.kv_scales is None else self.kv_scales[layer_idx]
        if self.places is None:
            return [LayerStep(self, self.kv_cache[layer_idx], scales)]
        return [
            LayerStep(self.others[group - 1] if group else self, self.kv_cache[place], scales)
            for group, place in self.places[layer_idx]
        ]
