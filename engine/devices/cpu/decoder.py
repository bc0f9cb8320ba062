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
from ....kernels.cpu.body import Adapted
from ....kernels.cpu.body import Body as CompiledBody
from ....kernels.cpu.products import PackedWeight
from ....kernels.cpu.sampling import Best
from ....kernels.cpu.step import Activations, BodyStep, Ends, Layers
from ...attention.metadata import AttentionMetadata
from ...body.body import BodyOutput, ForwardToLogits
from ...body.flat_decoder import (
    FlatDecoder,
    FlatLayer,
    Linear,
    Mixture,
    Mlp,
    Norm,
    rotary_factors,
)
from ...body.grouped_linear import GroupedLinear, dtype_of
from .attention import CpuPlan
from .packed_embedding import PackedEmbedding
from .packed_linear import PackedLinear
from .packing import pack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class CpuDecoder:
    """A Body that runs as one compiled function, `kernels.cpu.body.Body`."""

    def __init__(
        self,
        flat: FlatDecoder,
        packed: PackedEmbedding | None = None,
        *,
        quantization: str | None = None,
    ) -> None:
        """Take over the weights of the layers, which are emptied; those of mixtures have been
        packed already. `packed` stands in for the embedding; `quantization` is that of `pack`."""
        self._rotations = _Rotations(flat)
        self._layers = _pack_layers(flat, quantization)
        first = flat.layers[0]
        self._widths = (first.num_heads, first.num_kv_heads, first.head_dim)
        self._mixtures = [
            layer.mlp if isinstance(layer.mlp, Mixture) else None for layer in flat.layers
        ]
        # Only what is compiled here is known to be: a mixture has code of transformers around it.
        self.is_batch_invariant = not any(self._mixtures)
        self._update_scales = [layer.update_scale for layer in flat.layers]
        self._intermediate_size: int = max(map(_intermediate_size, flat.layers))
        # By default all layers are of one group, and have a place each.
        self._places = np.zeros((len(flat.layers), 2), dtype=np.int64)
        self._places[:, 1] = np.arange(len(flat.layers))
        self._placed: object = None
        self._cache = torch.empty(0)
        self._stored = as_array(self._cache)
        """The cache of the last step, and its memory."""
        scale = np.float32(flat.embedding_scale)
        if packed is None:
            self._dtype = flat.embedding.weight.dtype
            self._ends = Ends(as_array(flat.embedding.weight.detach()), None, scale)
        else:
            self._dtype = packed.dtype
            self._ends = Ends(np.zeros((0, 0), np.float32), None, scale, packed.packed)
        self._compiled = CompiledBody(self._ends, self._layers)
        self._vocab_size = 0
        self._activations: Activations | None = None
        self.adapted: Adapted | None = None
        """The LoRA adapters of each step, if there can be any."""

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        return self.forward_to_logits(input_ids, positions, input_ids[:0], metadata)[0]

    def expect_positions(self, length: int) -> None:
        """Do nothing: rotary factors are computed as positions come."""

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
        *,
        picked_only: bool = False,
    ) -> BodyOutput:
        """Implement `ForwardToLogits`; without a head, logits are `[R, 0]`. Hidden states and
        logits are valid until the next call."""
        cos, sin, rows = self._rotations(positions)
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
            rotations=rows,
            kind_rows=len(cos) // self._rotations.num_kinds,
            cos=cos,
            sin=sin,
            block_table=_stacked([one.block_table for one in groups]),
            starts=metadata.query_start_loc.numpy(),
            seq_lens=metadata.seq_lens.numpy(),
            tiles=plan.tiles,
            members=plan.members,
            tile_queries=plan.tile_queries,
            picked_only=picked_only,
        )
        numba.set_num_threads(plan.num_threads)
        if metadata.kv_cache is not self._cache:
            self._cache, self._stored = metadata.kv_cache, as_array(metadata.kv_cache)

        def mix(layer: int) -> None:
            self._mix(layer, activations, num_tokens)

        self._compiled.run(self._stored, step, activations, plan.num_threads, self.adapted, mix)
        return self._output(activations, num_tokens, num_logits, picked_only)

    def _output(
        self, activations: Activations, num_tokens: int, num_logits: int, picked_only: bool
    ) -> BodyOutput:
        """Return the results of a step."""
        states = activations.picked[:num_logits] if picked_only else activations.normed[:num_tokens]
        hidden = torch.from_numpy(states)
        logits = torch.from_numpy(activations.logits[:num_logits])
        if self._ends.head is None or self._dtype != torch.float32:  # others may round to equals
            return BodyOutput(hidden.to(self._dtype), logits.to(self._dtype))
        # Copies: what was sampled may be read after the next call.
        best = activations.best
        values, token_ids, finite = (
            torch.from_numpy(part[:num_logits].copy())
            for part in (best.values, best.token_ids, best.finite)
        )
        return BodyOutput(hidden, logits, (values, token_ids, finite))

    def _mix(self, layer: int, activations: Activations, num_tokens: int) -> None:
        """Run a layer's mixture of experts, the model's own module, on the normed rows."""
        mixture = self._mixtures[layer]
        assert mixture is not None
        hidden = torch.from_numpy(activations.normed[:num_tokens])
        mixed = mixture.forward(hidden.to(self._dtype)).float()
        if self._update_scales[layer] != 1:
            mixed *= self._update_scales[layer]
        if activations.update is activations.x:
            activations.x[:num_tokens] += mixed.numpy()
        else:
            activations.update[:num_tokens] = mixed.numpy()

    def _scratch(self, num_tokens: int, num_logits: int) -> Activations:
        """Return buffers of at least this size. They are kept from step to step, because the
        system would clear fresh memory in each one."""

        def zeros(*shape: int) -> Floats:
            return np.zeros(shape, np.float32)

        kept = self._activations
        rows, picks = num_tokens, num_logits
        if kept is None or len(kept.x) < rows or len(kept.picked) < picks:
            if kept is not None:
                # Logits grow by little: with a large vocabulary they are most of the memory.
                rows, picks = max(2 * rows, len(kept.x)), max(picks + 16, len(kept.picked))
            hidden_size = self._layers.input_norm.shape[1]
            heads, kv_heads, head_dim = self._widths
            x, normed = zeros(rows, hidden_size), zeros(rows, hidden_size)
            logits = zeros(picks, self._vocab_size)
            self._activations = Activations(
                x=x,
                normed=normed,
                qkv=zeros(rows, heads + 2 * kv_heads, head_dim),
                query=zeros(rows, heads, head_dim),
                attended=zeros(rows, heads, head_dim),
                gated=zeros(rows, self._intermediate_size),
                picked=zeros(picks, hidden_size),
                logits=logits,
                update=normed if self._layers.norms_updates else x,
                best=Best(
                    logits=logits,
                    bits=logits.view(np.int32),
                    values=zeros(picks),
                    token_ids=np.zeros(picks, np.int64),
                    finite=np.zeros(picks, np.bool_),
                ),
            )
        assert self._activations is not None
        return self._activations


def _stacked(tensors: Sequence[torch.Tensor]) -> NDArray[Any]:
    """Return the tensors of all groups of layers as one array, its first axis the group."""
    if len(tensors) == 1:
        return tensors[0].numpy()[None]
    return np.stack([tensor.numpy() for tensor in tensors])


class _Rotations:
    """Rotary factors by position, computed only once: a call of the model's own module takes as
    long as two layers of a small model. Those of one kind of layers follow those of another. Kinds
    of rope whose factors depend on the other positions of a step are computed in each one."""

    def __init__(self, flat: FlatDecoder) -> None:
        self._rotary, self._has_half_factors = flat.rotary, flat.has_half_factors
        self._kinds = flat.rotary_kinds
        self.num_kinds = len(self._kinds)
        types = getattr(flat.rotary, "rope_type", None)
        types = types.values() if isinstance(types, dict) else [types]
        self._is_static = all(one in _STATIC_ROPE_TYPES for one in types)
        self._table: tuple[Floats, Floats] = (np.empty((0, 0), np.float32),) * 2

    def __call__(self, positions: torch.Tensor) -> tuple[Floats, Floats, NDArray[np.int64]]:
        """Return cos and sin `[…, head_dim]`, and the row in them of each of the positions
        `[T]`."""
        if not self._is_static:
            return *self._compute(positions), np.arange(len(positions))
        rows = positions.numpy()
        longest = int(rows.max()) + 1
        known = len(self._table[0]) // self.num_kinds
        if longest > known:
            self._table = self._compute(torch.arange(max(longest, 1024, 2 * known)))
        return *self._table, rows

    def _compute(self, positions: torch.Tensor) -> tuple[Floats, Floats]:
        halves = self._has_half_factors
        of_kinds = [
            rotary_factors(self._rotary, torch.empty(1), positions, kind, has_half_factors=halves)
            for kind in self._kinds
        ]
        cos, sin = (torch.cat(parts).numpy() for parts in zip(*of_kinds, strict=True))
        return cos, sin


def can_compile(flat: FlatDecoder) -> bool:
    """Whether a CpuDecoder can run it: its layers are alike and whole, and their MLPs are mixtures
    or have SiLU."""
    return (
        len({_shape_of(layer) for layer in flat.layers}) == 1
        and len({_rotary_dim(flat, kind) for kind in flat.rotary_kinds}) == 1
        and len({_intermediate_size(layer) for layer in flat.layers} - {0}) <= 1
        and all(map(_can_compile, flat.layers))
    )


def _can_compile(layer: FlatLayer) -> bool:
    norms = (layer.output_norm is not None, layer.down_norm is not None)
    return (
        (isinstance(layer.mlp, Mixture) or layer.mlp.is_silu)
        and isinstance(layer.output, nn.Linear | GroupedLinear)  # other ranks have a part of it
        and dtype_of(layer.output) in FLOATS
        and (layer.softcap, layer.sinks) == (None, None)
        and (norms == (False, False) or (norms == (True, True) and layer.update_scale == 1))
    )


def _shape_of(layer: FlatLayer) -> tuple[object, ...]:
    """Return what the layers of a compiled body have in common."""
    return (
        *(layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.rotates_pairs),
        *(layer.qk_norm is None, layer.norms_all_heads),
        layer.output_norm is None,
    )


def _intermediate_size(layer: FlatLayer) -> int:
    """Return the inner size of a layer's MLP; 0 if it is a mixture."""
    return layer.mlp.down.in_features if isinstance(layer.mlp, Mlp) else 0


def _rotary_dim(flat: FlatDecoder, kind: str | None) -> int:
    """Return how many elements of each head layers of this kind rotate."""
    return flat.rotation(torch.empty(1), torch.zeros(1, dtype=torch.long), kind).cos.shape[1]


# Over 50 lines: most of them are the fields of Layers.
def _pack_layers(flat: FlatDecoder, quantization: str | None) -> Layers:
    """Pack the layers' weights, and stack those of norms. Norms that a model does not have get an
    epsilon of −1, and the last norm is an input norm after the last layer's."""
    layers, first = flat.layers, flat.layers[0]
    no_norm = Norm(torch.ones(len(flat.norm.weight)), -1.0)
    no_qk_norm = Norm(torch.ones(first.num_heads + first.num_kv_heads, first.head_dim), -1.0)

    def stack(norms: Sequence[Norm | None], missing: Norm = no_norm) -> tuple[Floats, Floats]:
        present = [norm or missing for norm in norms]
        weights = torch.stack([norm.weight.float() for norm in present]).numpy()
        return weights, np.array([norm.eps for norm in present], np.float32)

    def stack_updates(norms: Sequence[Norm | None]) -> tuple[Floats, Floats]:
        if first.output_norm is None:
            return np.empty((0, 1), np.float32), np.empty(0, np.float32)
        return stack(norms)

    def packed(linear: Linear, parts: int = 1) -> PackedWeight:
        return pack(linear, parts, quantization=quantization)

    input_norm, input_epsilons = stack([*(layer.input_norm for layer in layers), flat.norm])
    mlp_norm, mlp_epsilons = stack([layer.mlp_norm for layer in layers])
    qk_norm, qk_epsilons = stack([layer.qk_norm for layer in layers], no_qk_norm)
    output_norm, output_epsilons = stack_updates([layer.output_norm for layer in layers])
    # The MLP's update is added before the norm of the next layer.
    down_norm, down_epsilons = stack_updates([None, *(layer.down_norm for layer in layers)])
    mlps = [(layer.mlp, layer.update_scale) for layer in layers]
    return Layers(
        input_norm=input_norm,
        qkv=[packed(layer.qkv) for layer in layers],
        qk_norm=qk_norm,
        output=[packed(_scaled(layer.output, layer.update_scale)) for layer in layers],
        mlp_norm=mlp_norm,
        gate_up=[packed(mlp.gate_up, 2) if isinstance(mlp, Mlp) else None for mlp, _ in mlps],
        down=[
            packed(_scaled(mlp.down, scale)) if isinstance(mlp, Mlp) else None
            for mlp, scale in mlps
        ],
        output_norm=output_norm,
        down_norm=down_norm,
        input_epsilons=input_epsilons,
        qk_epsilons=qk_epsilons,
        mlp_epsilons=mlp_epsilons,
        output_epsilons=output_epsilons,
        down_epsilons=down_epsilons,
        scales=np.array([layer.scale for layer in layers], np.float32),
        windows=np.array([layer.window or 0 for layer in layers], np.int64),
        rotates=np.array([int(layer.rotates) for layer in layers], np.int64),
        kinds=np.array([flat.rotary_kinds.index(layer.rotary_kind) for layer in layers], np.int64),
        norms_all_heads=first.norms_all_heads,
        rotates_pairs=first.rotates_pairs,
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
