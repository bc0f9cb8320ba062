"""The phases of a step of a Llama-shaped model, and the kernels that they call.

`body.py` says what they are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .attention import Attention, attend_tile, one_a_tile
from .kernel import signature_of
from .norms import Heads, Move, Norm, Pick, move, normalise, pick, rotate
from .products import Call, PackedWeight, Quantised
from .region import Phase, Task
from .step import Activations, BodyStep, Ends, Layers

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
) = range(16)
"""The kinds of phases: those of a layer, and those after the layers. The last norm is a phase of
the first kind. Only the last layer moves rows, if it computes the picks alone."""
LAYER_PHASES, LAST_PHASES, PRODUCTS = 13, 3, (QKV, OUTPUT, GATE_UP, DOWN, HEAD)
Place = tuple[int, int | None]
"""A kind of phases, and for those that differ by layer the layer."""
KERNEL, WORK, ITEMS, LAYER, ROWS, CHUNK = range(len(Phase._fields))
"""The columns of the table of phases."""
NO_SOFTCAP = np.float32(0)
_NO_UPDATES = np.empty((0, 1), np.float32)


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
    x, normed, qkv, _, attended, gated, picked, logits, update = activations
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
    *,
    narrow: bool,
) -> dict[Place, Call]:
    """Return the kernels with works that change with each step. If `narrow`, the last layer
    computes only the picks."""
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
    picks = step.picks
    if narrow:
        flat = attended.reshape(len(attended), -1)
        calls[MOVE, None] = (move, Move(x, flat, picks))
        calls[ATTEND, len(layers.scales) - 1] = (attend_tile, _one_query_a_tile(attention, picks))
        picks = np.arange(len(picks))
    return calls | {
        (INPUT_NORM, None): (normalise, norm),
        (ROTATE, None): (rotate, heads),
        (ATTEND, None): (attend_tile, attention),
        (PICK, None): (pick, Pick(normed, picks, activations.picked)),
    }


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
