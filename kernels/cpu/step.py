"""A step of a Llama-shaped model: what it reads and writes, its phases, and the kernels they call.

`body.py` says what the phases are for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .attention import Attention, attend_tile
from .kernel import signature_of
from .norms import Heads, Move, Norm, Pick, move, normalise, pick, rotate
from .products import Call, PackedEmbedding, PackedWeight, Quantised
from .region import Phase, Task
from .sampling import Best, find_best

Array = np.ndarray[Any, Any]

(
    INPUT_NORM,
    QUANTISE_QKV,
    QKV,
    ROTATE,
    ATTEND,
    MOVE,
    QUANTISE_OUTPUT,
    OUTPUT,
    MLP_NORM,
    QUANTISE_GATE_UP,
    GATE_UP,
    QUANTISE_DOWN,
    DOWN,
    PICK,
    QUANTISE_HEAD,
    HEAD,
    BEST,
) = range(17)
"""The kinds of phases: those of a layer, and those after the layers. The last norm is a phase of
the first kind. Only the last layer moves rows, if it computes the picks alone."""
LAYER_PHASES, LAST_PHASES, PRODUCTS = 13, 4, (QKV, OUTPUT, GATE_UP, DOWN, HEAD)
Place = tuple[int, int | None]
"""A kind of phases, and for those that differ by layer the layer."""
KERNEL, WORK, ITEMS, LAYER, ROWS, CHUNK = range(len(Phase._fields))
"""The columns of the table of phases."""
NO_SOFTCAP = np.float32(0)
_NO_UPDATES = np.empty((0, 1), np.float32)


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
    """The arrays that phases hand to each other: float32, but for `best`."""

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
    best: Best
    """Of the logits."""


class Scratch(NamedTuple):
    """Memory in which threads work, made by `products.make_tiles` and `attention.make_scratch`:
    each thread has its own, but for `room`."""

    tiles: Any
    attention: tuple[Array, ...]
    room: Quantised
    """Rows of one product at a time, quantised; all threads read them."""


def products_of(ends: Ends, layers: Layers) -> list[tuple[Place, PackedWeight]]:
    """Return the weights of all products, and which phases are theirs. The phase before a product's
    quantises its input, if that has to be done."""
    gate_up, down = layers.gate_up, layers.down
    by_kind = {QKV: layers.qkv, OUTPUT: layers.output, GATE_UP: gate_up, DOWN: down}
    products: list[tuple[Place, PackedWeight]] = [
        ((kind, layer), each)
        for kind, weights in by_kind.items()
        for layer, each in enumerate(weights)
        if each is not None
    ]
    return products if ends.head is None else [*products, ((HEAD, None), ends.head)]


def lasting_calls(
    ends: Ends, layers: Layers, activations: Activations, scratch: Scratch
) -> dict[Place, Call]:
    """Return the kernels with works that are the same for all steps with these activations."""
    x, normed, qkv, _, attended, gated, picked, logits, update, best = activations
    room, tiles, no_ids = scratch.room, scratch.tiles, np.empty(0, np.int64)
    qkv, attended = (part.reshape(len(part), -1) for part in (qkv, attended))
    ways = {
        QKV: (normed, qkv),
        OUTPUT: (attended, update),
        GATE_UP: (normed, gated),
        DOWN: (gated, update),
        HEAD: (picked, logits),
    }
    fetched = (no_ids, ends.embedding, ends.embedding_scale)
    updates = _updates_of(layers, activations)
    norm = Norm(
        *(x, layers.mlp_norm, layers.mlp_epsilons, normed),
        *(updates, layers.output_norm, layers.output_epsilons, *fetched),
    )
    calls: dict[Place, Call] = {
        (MLP_NORM, None): (normalise, norm),
        (MOVE, None): (move, Move(x, attended, no_ids)),
    }
    if ends.head is not None:
        calls[BEST, None] = (find_best, best)
    for (kind, layer), weight in products_of(ends, layers):
        source, target = ways[kind]
        quantise = weight.quantise(source, room, tiles)
        if quantise is not None:
            calls[kind - 1, layer] = quantise
        if kind == GATE_UP:
            calls[kind, layer] = weight.multiply_gated(source, room, target, tiles)
        else:
            adds = target is x
            calls[kind, layer] = weight.multiply(source, room, target, tiles, adds)
    return calls


def step_calls(
    ends: Ends,
    layers: Layers,
    cache: Array,
    step: BodyStep,
    activations: Activations,
    scratch: Scratch,
) -> dict[Place, Call]:
    """Return the kernels with works that change with each step."""
    x, normed, qkv, query, attended, *_ = activations
    calls: dict[Place, Call] = {}
    ids, input_norm = step.input_ids, (layers.input_norm, layers.input_epsilons)
    if ends.packed is not None:
        call = ends.packed.fetch(ids, x, ends.embedding_scale, input_norm, normed)
        calls[INPUT_NORM, 0], ids = call, ids[:0]
    norm = Norm(
        *(x, *input_norm, normed, _updates_of(layers, activations)),
        *(layers.down_norm, layers.down_epsilons, ids, ends.embedding, ends.embedding_scale),
    )
    heads = Heads(
        *(qkv, layers.qk_norm, layers.qk_epsilons),
        *(step.cos, step.sin, layers.rotates, step.rotations, layers.kinds),
        kind_rows=step.kind_rows,
        norms_all_heads=layers.norms_all_heads,
        rotates_pairs=layers.rotates_pairs,
        slots=step.slots,
        cache=cache,
        layer_places=step.layer_places,
        query=query,
    )
    attention = Attention(
        *(query, cache, step.layer_places, step.block_table, step.starts, step.seq_lens),
        *(step.tiles, step.members, step.tile_queries),
        *(layers.scales, layers.windows, NO_SOFTCAP, layers.scales, False, attended),
        *scratch.attention,
    )
    return calls | {
        (INPUT_NORM, None): (normalise, norm),
        (ROTATE, None): (rotate, heads),
        (ATTEND, None): (attend_tile, attention),
        (PICK, None): (pick, Pick(normed, step.picks, activations.picked)),
    }


def narrow_calls(
    calls: Mapping[Place, Call], activations: Activations, picks: Array, last: int
) -> dict[Place, Call]:
    """Return what is called instead if the layer `last` computes only the picks, which are the
    first rows afterwards."""
    _, attention = calls[ATTEND, None]
    assert isinstance(attention, Attention)
    attended = activations.attended.reshape(len(activations.attended), -1)
    front = np.arange(len(picks))
    return {
        (ATTEND, last): (attend_tile, _one_query_a_tile(attention, picks)),
        (MOVE, None): (move, Move(activations.x, attended, picks)),
        (PICK, None): (pick, Pick(activations.normed, front, activations.picked)),
    }


@functools.lru_cache(maxsize=64)
def one_a_tile(count: int) -> Array:
    """Return tiles of one member each, which share nothing: not to be written to."""
    firsts = np.arange(count)
    return np.stack((firsts, firsts + 1, np.zeros_like(firsts)), axis=1)


def _one_query_a_tile(attention: Attention, picks: Array) -> Attention:
    """Return the attention of these tokens' queries alone, those with most keys first."""
    starts = attention.starts
    sequences = np.searchsorted(starts, picks, side="right") - 1
    keys = attention.seq_lens[sequences] - starts[sequences + 1] + picks
    order = np.argsort(-keys, kind="stable")
    members = np.stack((sequences, picks - starts[sequences]), axis=1)[order]
    return attention._replace(tiles=one_a_tile(len(picks)), members=members, tile_queries=1)


def _updates_of(layers: Layers, activations: Activations) -> Array:
    """Return the updates that a norm adds first; none if the products have added them."""
    updates: Array = activations.update
    return updates if layers.norms_updates else _NO_UPDATES


def tasks_of(calls: Mapping[Place, Call]) -> list[Task]:
    """Return the kernels of a step, and what they are compiled for. The longest is the last."""
    tasks = {(kernel, signature_of(work)): None for kernel, work in calls.values()}
    return sorted(tasks, key=lambda task: task[0] is attend_tile)
