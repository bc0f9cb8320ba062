"""What a step of a model reads and writes: weights, tokens, and the arrays between its phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .products import PackedEmbedding, PackedWeight


class Layers(NamedTuple):
    """The weights of all layers: those of norms stacked, those of products one a layer.

    For gate and up, panel 2i is the i-th of gate, 2i + 1 of up. A layer whose MLP is a mixture of
    experts has neither those nor `down`.
    """

    input_norm: Any
    """`[num_layers + 1, hidden_size]`; the last one is the body's own."""
    qkv: Sequence[PackedWeight]
    qk_norm: Any
    """`[num_layers, heads + kv_heads, head_dim]`."""
    output: Sequence[PackedWeight]
    mlp_norm: Any
    """`[num_layers, hidden_size]`."""
    gate_up: Sequence[PackedWeight | None]
    down: Sequence[PackedWeight | None]
    output_norm: Any
    """Norms of the attention's updates, `[num_layers, hidden_size]`; empty if updates have none."""
    down_norm: Any
    """`[num_layers + 1, hidden_size]`: the i-th is that of the MLP's update of layer i − 1."""
    input_epsilons: Any
    """`[num_layers + 1]`. A norm that a model does not have has −1."""
    qk_epsilons: Any
    """`[num_layers]`, -1 if Q and K have no norms."""
    mlp_epsilons: Any
    """`[num_layers]`."""
    output_epsilons: Any
    """`[num_layers]`."""
    down_epsilons: Any
    """`[num_layers + 1]`."""
    scales: Any
    """`[num_layers]`."""
    windows: Any
    """`[num_layers]`, 0 if a layer has none."""
    rotates: Any
    """`[num_layers]`, 0 if a layer rotates nothing, else 1."""
    kinds: Any
    """Which of several kinds of rotations a layer has, `[num_layers]`."""
    norms_all_heads: bool
    """Whether `qk_norm` is of all heads of Q, and all of K, not of each head."""
    rotates_pairs: bool
    """Whether neighbours rotate, not halves."""

    @property
    def norms_updates(self) -> bool:
        """Whether both updates of a layer are normed before they are added."""
        return len(self.output_norm) > 0


class Ends(NamedTuple):
    """What a model begins and ends with."""

    embedding: Any
    """`[vocab_size, hidden_size]`; empty if it is packed."""
    head: PackedWeight | None
    """None if the head is not a plain product."""
    embedding_scale: Any = np.float32(1)
    """The factor of the embedding's rows."""
    packed: PackedEmbedding | None = None


class BodyStep(NamedTuple):
    """The tokens of a step; input_ids are `[T]`."""

    input_ids: Any
    picks: Any
    """Which tokens need logits, `[R]`."""
    slots: Any
    """The cache slot of each token, `[groups, T]`."""
    rotations: Any
    """The row of cos and sin of each token, `[T]`, for the first kind of rotations."""
    kind_rows: int
    """Rows from one kind to the next."""
    cos: Any
    """`[kinds * kind_rows, n]`, as in Rotation."""
    sin: Any
    layer_places: Any
    """This and the rest are as in `attention.Attention`."""
    block_table: Any
    starts: Any
    seq_lens: Any
    tiles: Any
    members: Any
    tile_queries: int
    picked_only: bool
    """Whether nobody needs the hidden states of tokens that are not picked."""


class Activations(NamedTuple):
    """The float32 arrays that phases hand to each other."""

    x: Any
    """`[., hidden_size]`."""
    normed: Any
    """Like x; after the last norm, the hidden states."""
    qkv: Any
    """`[., heads + 2 * kv_heads, head_dim]`."""
    query: Any
    """`[., heads, head_dim]`."""
    attended: Any
    """Like query."""
    gated: Any
    """`[., intermediate_size]`."""
    picked: Any
    """The hidden states of the picks, `[., hidden_size]`."""
    logits: Any
    """`[., vocab_size]`."""
    update: Any
    """Where the output and down products go: x, to which they are added, or `normed` if they are
    normed first."""
