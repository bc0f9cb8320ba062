"""A model with a flat body on the CPU: its weights packed, a step one compiled function.

Importing this loads Numba: only a worker on the CPU does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from torch import nn

from ....kernels.cpu.arrays import FLOATS, as_array
from ....kernels.cpu.body import Activations, Body, BodyStep, Ends, Layers
from ....kernels.cpu.panels import PANEL_COLUMNS
from ...body.flat_decoder import FlatDecoder, FlatLayer, Norm, Rotation, rotary_factors
from .packed_linear import PackedLinear, pack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...attention.interface import AttentionMetadata


_STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class CpuDecoder:
    """A model with a flat body that runs as one compiled function, `kernels.cpu.body.Body`."""

    def __init__(self, flat: FlatDecoder, *, int8: bool = False) -> None:
        """Takes the weights of the layers over: theirs are emptied. `int8` as in `pack`."""
        self._rotations = _Rotations(flat.rotary)
        self._layers = _pack_layers(flat.layers, flat.norm, int8)
        first = flat.layers[0]
        self._widths = (first.num_heads, first.num_kv_heads, first.head_dim)
        self._intermediate_size: int = first.down.in_features
        self._dtype = flat.embedding.weight.dtype
        embedding = as_array(flat.embedding.weight.detach())
        no_panels = np.empty((0, embedding.shape[1], PANEL_COLUMNS), embedding.dtype)
        self._ends = Ends(embedding, no_panels, np.empty((2, 0), np.float32))
        self._compiled = Body(self._ends, self._layers)
        self._vocab_size = 0
        self._activations: Activations | None = None

    @property
    def has_head(self) -> bool:
        return self._vocab_size > 0

    def append_head(self, head: PackedLinear) -> None:
        """From now on calls return logits."""
        self._activations = None
        self._ends = self._ends._replace(head=head.panels, head_affine=head.affine)
        self._compiled = Body(self._ends, self._layers)
        self._vocab_size = head.out_features

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logit_indices: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and positions `[T]`, logit_indices `[R]` → hidden states `[T, hidden_size]`,
        and logits `[R, vocab_size]` if it has a head; valid until the next call."""
        rotation, rows = self._rotations(positions)
        plan = metadata.cpu_plan
        assert plan is not None
        num_tokens, num_logits = len(input_ids), len(logit_indices)
        activations = self._scratch(num_tokens, num_logits)
        step = BodyStep(
            input_ids=input_ids.numpy(),
            picks=logit_indices.numpy(),
            slots=metadata.slot_mapping.numpy(),
            rotations=rows.numpy(),
            cos=rotation.cos.numpy(),
            sin=rotation.sin.numpy(),
            block_table=metadata.block_table.numpy(),
            starts=metadata.query_start_loc.numpy(),
            seq_lens=metadata.seq_lens.numpy(),
            tiles=plan.tiles,
            members=plan.members,
            tile_queries=plan.tile_queries,
        )
        numba.set_num_threads(plan.num_threads)
        cache = as_array(metadata.kv_cache)
        self._compiled.run(cache, step, activations, plan.num_threads)
        hidden = torch.from_numpy(activations.normed[:num_tokens])
        logits = torch.from_numpy(activations.logits[:num_logits])
        return hidden.to(self._dtype), logits.to(self._dtype)

    def _scratch(self, num_tokens: int, num_logits: int) -> Activations:
        """Kept from step to step: fresh memory would be cleared by the system at each one."""
        kept = self._activations
        rows, picks = num_tokens, num_logits
        if kept is None or len(kept.x) < rows or len(kept.picked) < picks:
            if kept is not None:
                # By little for the logits: with a large vocabulary they are most of it.
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


class _Rotations:
    """Rotary factors by position, which are computed but once: a call of the model's own module
    takes as long as two layers of a small one. Not where they depend on the positions around."""

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        rope_type = getattr(rotary, "rope_type", None)
        self._is_static = rope_type in _STATIC_ROPE_TYPES
        self._table = Rotation(torch.empty(0), torch.empty(0))

    def __call__(self, positions: torch.Tensor) -> tuple[Rotation, torch.Tensor]:
        """Factors `[., head_dim]`, and which of them the positions `[T]` have, `[T]`."""
        if not self._is_static:
            return self._compute(positions), torch.arange(len(positions))
        longest = int(positions.max()) + 1
        if longest > len(self._table.cos):
            self._table = self._compute(torch.arange(max(longest, 1024, 2 * len(self._table.cos))))
        return self._table, positions

    def _compute(self, positions: torch.Tensor) -> Rotation:
        return rotary_factors(self._rotary, torch.empty(1), positions)


def can_compile(flat: FlatDecoder) -> bool:
    """Whether CpuDecoder runs it: SiLU, and layers that are alike."""
    first = flat.layers[0]
    shapes = (first.num_heads, first.num_kv_heads, first.down.in_features, first.qk_norm is None)
    return all(
        layer.is_silu
        and shapes
        == (layer.num_heads, layer.num_kv_heads, layer.down.in_features, layer.qk_norm is None)
        and layer.down.weight.dtype in FLOATS
        for layer in flat.layers
    )


def _pack_layers(layers: Sequence[FlatLayer], last_norm: Norm, int8: bool) -> Layers:
    def stack(norms: Sequence[Norm]) -> NDArray[np.float32]:
        return torch.stack([norm.weight.float() for norm in norms]).numpy()

    first = layers[0]
    no_norm = Norm(torch.ones(first.num_heads + first.num_kv_heads, first.head_dim), -1.0)
    qk_norms = [layer.qk_norm or no_norm for layer in layers]
    input_norms = [*(layer.input_norm for layer in layers), last_norm]
    mlp_norms = [layer.mlp_norm for layer in layers]
    qkv, qkv_affine = pack([layer.qkv for layer in layers], int8=int8)
    output, output_affine = pack([layer.output for layer in layers], int8=int8)
    gate_up, gate_up_affine = pack([layer.gate_up for layer in layers], 2, int8=int8)
    down, down_affine = pack([layer.down for layer in layers], int8=int8)
    return Layers(
        input_norm=stack(input_norms),
        qkv=qkv,
        qkv_affine=qkv_affine,
        qk_norm=stack(qk_norms),
        output=output,
        output_affine=output_affine,
        mlp_norm=stack(mlp_norms),
        gate_up=gate_up,
        gate_up_affine=gate_up_affine,
        down=down,
        down_affine=down_affine,
        input_epsilons=np.array([norm.eps for norm in input_norms], np.float32),
        qk_epsilons=np.array([norm.eps for norm in qk_norms], np.float32),
        mlp_epsilons=np.array([norm.eps for norm in mlp_norms], np.float32),
        scales=np.array([layer.scale for layer in layers], np.float32),
        windows=np.array([layer.window or 0 for layer in layers], np.int64),
    )
