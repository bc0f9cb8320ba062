"""A flat body on the CPU: its layers packed, and run as one compiled function.

Importing this loads Numba: only a worker on the CPU does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
import torch.nn.functional as F

from .cpu_body import Activations, Layers, Step, run_body
from .cpu_linear import pack
from .cpu_numbers import FLOATS, PANEL_ROWS, as_array
from .flat_decoder import FlatDecoder, FlatLayer, Norm, rotary_factors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .attention import AttentionMetadata


class CpuDecoder:
    """A flat body whose layers run as one compiled function, `cpu_body.run_body`."""

    def __init__(self, flat: FlatDecoder) -> None:
        """Takes the weights of the layers over: theirs are emptied."""
        self._embedding, self._rotary = flat.embedding, flat.rotary
        # A copy, as a part of a mapped file would keep all of it resident.
        self._norm = Norm(flat.norm.weight.float().clone(), flat.norm.eps)
        self._layers = _pack_layers(flat.layers)
        first = flat.layers[0]
        self._widths = (first.num_heads, first.num_kv_heads, first.head_dim)
        self._intermediate_size: int = first.down.in_features
        self._activations: Activations | None = None

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """input_ids and positions `[T]` → hidden states `[T, hidden_size]`."""
        x = F.embedding(input_ids, self._embedding.weight).float()
        rotation = rotary_factors(self._rotary, x, positions)
        plan = metadata.cpu_plan
        assert plan is not None
        activations = self._scratch(x)
        activations.x[: len(x)] = x.numpy()
        step = Step(
            cos=rotation.cos.numpy(),
            sin=rotation.sin.numpy(),
            slots=metadata.slot_mapping.numpy(),
            block_table=metadata.block_table.numpy(),
            starts=metadata.query_start_loc.numpy(),
            seq_lens=metadata.seq_lens.numpy(),
            tiles=plan.tiles,
            tile_queries=plan.tile_queries,
        )
        numba.set_num_threads(plan.num_threads)
        run_body(self._layers, as_array(metadata.kv_cache), step, activations, plan.num_threads)
        hidden = torch.from_numpy(activations.x[: len(x)])
        return self._norm(hidden).to(self._embedding.weight.dtype)

    def _scratch(self, x: torch.Tensor) -> Activations:
        """Kept from step to step: fresh memory would be cleared by the system at each one."""
        if self._activations is None or len(self._activations.x) < len(x) + PANEL_ROWS:
            rows, hidden_size = 2 * len(x) + PANEL_ROWS, x.shape[1]
            heads, kv_heads, head_dim = self._widths
            shapes = (
                (rows, hidden_size),
                (rows, hidden_size),
                (rows, heads + 2 * kv_heads, head_dim),
                (rows, heads, head_dim),
                (rows, heads, head_dim),
                (rows, self._intermediate_size),
            )
            self._activations = Activations(*(np.zeros(shape, np.float32) for shape in shapes))
        return self._activations


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


def _pack_layers(layers: Sequence[FlatLayer]) -> Layers:
    def stack(norms: list[Norm]) -> NDArray[np.float32]:
        return torch.stack([norm.weight.float() for norm in norms]).numpy()

    first = layers[0]
    no_norm = Norm(torch.ones(first.num_heads + first.num_kv_heads, first.head_dim), -1.0)
    qk_norms = [layer.qk_norm or no_norm for layer in layers]
    epsilons = [
        (layer.input_norm.eps, qk_norm.eps, layer.mlp_norm.eps)
        for layer, qk_norm in zip(layers, qk_norms, strict=True)
    ]
    qkv, qkv_bias = pack([layer.qkv for layer in layers])
    output, output_bias = pack([layer.output for layer in layers])
    gate_up, gate_up_bias = pack([layer.gate_up for layer in layers], parts=2)
    down, down_bias = pack([layer.down for layer in layers])
    return Layers(
        input_norm=stack([layer.input_norm for layer in layers]),
        qkv=qkv,
        qkv_bias=qkv_bias,
        qk_norm=stack(qk_norms),
        output=output,
        output_bias=output_bias,
        mlp_norm=stack([layer.mlp_norm for layer in layers]),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=down_bias,
        epsilons=np.array(epsilons, np.float32),
        scales=np.array([layer.scale for layer in layers], np.float32),
        windows=np.array([layer.window or 0 for layer in layers], np.int64),
    )
