"""A flat body on the CPU: its weights are packed, and a step is one compiled function.

Importing this loads Numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from torch import nn

from ....kernels.cpu.arrays import FLOATS, as_array
from ....kernels.cpu.body import Activations, Adapted, BodyStep, Ends, Layers
from ....kernels.cpu.body import Body as CompiledBody
from ...attention.metadata import AttentionMetadata
from ...body.body import ForwardToLogits
from ...body.flat_decoder import (
    FlatDecoder,
    FlatLayer,
    Linear,
    Norm,
    Rotation,
    rotary_factors,
)
from ...body.grouped_linear import GroupedLinear, dtype_of
from .attention import CpuPlan
from .packed_linear import PackedLinear
from .packing import pack

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class CpuDecoder:
    """A Body that runs as one compiled function, `kernels.cpu.body.Body`."""

    is_batch_invariant = True

    def __init__(self, flat: FlatDecoder, *, quantization: str | None = None) -> None:
        """Take over the weights of the layers, which are emptied. `quantization` is that of
        `pack`."""
        self._rotations = _Rotations(flat.rotary)
        self._layers = _pack_layers(flat.layers, flat.norm, quantization)
        first = flat.layers[0]
        self._widths = (first.num_heads, first.num_kv_heads, first.head_dim)
        self._intermediate_size: int = first.down.in_features
        self._dtype = flat.embedding.weight.dtype
        # By default all layers are of one group, and have a place each.
        self._places = np.zeros((len(flat.layers), 2), dtype=np.int64)
        self._places[:, 1] = np.arange(len(flat.layers))
        self._placed: object = None
        embedding = as_array(flat.embedding.weight.detach())
        self._ends = Ends(embedding, None, np.float32(flat.embedding_scale))
        self._compiled = CompiledBody(self._ends, self._layers)
        self._vocab_size = 0
        self._activations: Activations | None = None
        self.adapted: Adapted | None = None
        """The LoRA adapters of each step, if there can be any."""

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        return self.forward_to_logits(input_ids, positions, input_ids[:0], metadata)[0]

    def fuse_head(self, product: nn.Module) -> ForwardToLogits | None:
        if not isinstance(product, PackedLinear):
            return None
        self._activations = None
        self._ends = self._ends._replace(head=product.packed)
        self._compiled = CompiledBody(self._ends, self._layers)
        self._vocab_size = product.out_features
        return self.forward_to_logits

    def forward_to_logits(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logit_indices: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and positions `[T]`, logit_indices `[R]` → hidden states `[T, hidden_size]`
        and logits `[R, vocab_size]` (`[R, 0]` without a head). Both are valid until the next
        call."""
        rotation, rows = self._rotations(positions)
        plan = metadata.plan
        assert isinstance(plan, CpuPlan)
        num_tokens, num_logits = len(input_ids), len(logit_indices)
        activations = self._scratch(num_tokens, num_logits)
        groups = (metadata, *metadata.others)
        if metadata.places is not self._placed:
            self._placed = metadata.places
            self._places = np.array(metadata.places, dtype=np.int64).reshape(-1, 2)
        step = BodyStep(
            input_ids=input_ids.numpy(),
            picks=logit_indices.numpy(),
            slots=_stacked([one.slot_mapping for one in groups]),
            layer_places=self._places,
            rotations=rows.numpy(),
            cos=rotation.cos.numpy(),
            sin=rotation.sin.numpy(),
            block_table=_stacked([one.block_table for one in groups]),
            starts=metadata.query_start_loc.numpy(),
            seq_lens=metadata.seq_lens.numpy(),
            tiles=plan.tiles,
            members=plan.members,
            tile_queries=plan.tile_queries,
        )
        numba.set_num_threads(plan.num_threads)
        cache = as_array(metadata.kv_cache)
        self._compiled.run(cache, step, activations, plan.num_threads, self.adapted)
        hidden = torch.from_numpy(activations.normed[:num_tokens])
        logits = torch.from_numpy(activations.logits[:num_logits])
        return hidden.to(self._dtype), logits.to(self._dtype)

    def _scratch(self, num_tokens: int, num_logits: int) -> Activations:
        """Return buffers of at least this size. They are kept from step to step, because the
        system would clear fresh memory in each one."""
        kept = self._activations
        rows, picks = num_tokens, num_logits
        if kept is None or len(kept.x) < rows or len(kept.picked) < picks:
            if kept is not None:
                # Logits grow by little: with a large vocabulary they are most of the memory.
                rows, picks = max(2 * rows, len(kept.x)), max(picks + 16, len(kept.picked))
            hidden_size = self._ends.embedding.shape[1]
            heads, kv_heads, head_dim = self._widths
            shapes = (
                (rows, hidden_size),
                (rows, hidden_size),
                (rows, heads + 2 * kv_heads, head_dim),
                (rows, heads, head_dim),
                (rows, heads, head_dim),
                (rows, self._intermediate_size),
                (picks, hidden_size),
                (picks, self._vocab_size),
            )
            self._activations = Activations(*(np.zeros(shape, np.float32) for shape in shapes))
        assert self._activations is not None
        return self._activations


def _stacked(tensors: Sequence[torch.Tensor]) -> NDArray[Any]:
    """Return the tensors of all groups of layers as one array, its first axis the group."""
    if len(tensors) == 1:
        return tensors[0].numpy()[None]
    return np.stack([tensor.numpy() for tensor in tensors])


class _Rotations:
    """Rotary factors by position, computed only once: a call of the model's own module takes as
    long as two layers of a small model. Kinds of rope whose factors depend on the other positions
    of a step are computed in each one."""

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        rope_type = getattr(rotary, "rope_type", None)
        self._is_static = rope_type in _STATIC_ROPE_TYPES
        self._table = Rotation(torch.empty(0), torch.empty(0))

    def __call__(self, positions: torch.Tensor) -> tuple[Rotation, torch.Tensor]:
        """Return factors `[…, head_dim]`, and the row in them of each of the positions `[T]`."""
        if not self._is_static:
            return self._compute(positions), torch.arange(len(positions))
        longest = int(positions.max()) + 1
        if longest > len(self._table.cos):
            self._table = self._compute(torch.arange(max(longest, 1024, 2 * len(self._table.cos))))
        return self._table, positions

    def _compute(self, positions: torch.Tensor) -> Rotation:
        return rotary_factors(self._rotary, torch.empty(1), positions)


def can_compile(flat: FlatDecoder) -> bool:
    """Whether a CpuDecoder can run it: its layers are alike, with SiLU, rotations of one kind, and
    no norms of their updates, and whole."""
    first = flat.layers[0]
    if not isinstance(first.down, nn.Linear | GroupedLinear):  # other ranks have a part of it
        return False
    shapes = (first.num_heads, first.num_kv_heads, first.down.in_features, first.qk_norm is None)
    return flat.rotary_kinds == [None] and all(
        layer.is_silu
        and (layer.softcap, layer.output_norm, layer.down_norm) == (None, None, None)
        and shapes
        == (layer.num_heads, layer.num_kv_heads, layer.down.in_features, layer.qk_norm is None)
        and dtype_of(layer.down) in FLOATS
        for layer in flat.layers
    )


def _pack_layers(layers: Sequence[FlatLayer], last_norm: Norm, quantization: str | None) -> Layers:
    """Pack the layers' weights, and stack those of norms. Norms of Q and K that a model does not
    have get an epsilon of −1, and the last norm is an input norm after the last layer's."""

    def stack(norms: Sequence[Norm]) -> NDArray[np.float32]:
        return torch.stack([norm.weight.float() for norm in norms]).numpy()

    first = layers[0]
    no_norm = Norm(torch.ones(first.num_heads + first.num_kv_heads, first.head_dim), -1.0)
    qk_norms = [layer.qk_norm or no_norm for layer in layers]
    input_norms = [*(layer.input_norm for layer in layers), last_norm]
    mlp_norms = [layer.mlp_norm for layer in layers]
    packed = [
        (
            pack(layer.qkv, quantization=quantization),
            pack(_scaled(layer.output, layer.update_scale), quantization=quantization),
            pack(layer.gate_up, 2, quantization=quantization),
            pack(_scaled(layer.down, layer.update_scale), quantization=quantization),
        )
        for layer in layers
    ]
    qkv, output, gate_up, down = zip(*packed, strict=True)
    return Layers(
        input_norm=stack(input_norms),
        qkv=qkv,
        qk_norm=stack(qk_norms),
        output=output,
        mlp_norm=stack(mlp_norms),
        gate_up=gate_up,
        down=down,
        input_epsilons=np.array([norm.eps for norm in input_norms], np.float32),
        qk_epsilons=np.array([norm.eps for norm in qk_norms], np.float32),
        mlp_epsilons=np.array([norm.eps for norm in mlp_norms], np.float32),
        scales=np.array([layer.scale for layer in layers], np.float32),
        windows=np.array([layer.window or 0 for layer in layers], np.int64),
        rotates=np.array([int(layer.rotates) for layer in layers], np.int64),
    )


def _scaled(linear: Linear, factor: float) -> Linear:
    """Multiply the weight and the bias of a layer, in place."""
    if factor == 1:
        return linear
    if isinstance(linear, GroupedLinear):
        weight = linear.grouped
        minimum = None if weight.minimum is None else weight.minimum * factor
        linear.grouped = weight._replace(scale=weight.scale * factor, minimum=minimum)
    else:
        linear.weight = nn.Parameter(linear.weight.detach() * factor, requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach() * factor, requires_grad=False)
    return linear
