"""A step of a Llama-shaped model on the CPU, from token ids to logits, in one parallel region.

Theory of operation
-------------------
A layer is eight phases (`region.py`), each cut into items that threads take as they get free:

    normalise ─ Q, K, V ─ rotate, store ─ attend ─ output product, += x ─
    normalise ─ gate, up, SiLU·mul ─ down product, += x

and after the layers come the last norm, the rows whose logits are wanted, and the head's product.
Each product has a phase before it, which quantises its input for a weight of integers, or is empty.
If a family norms its updates, the products leave them where their input was, and the norm that
comes next norms and adds them first. A mixture of experts has no phases, since the number of its
items is not known before its router has run: the region ends before it and begins again after it.

The threads stay in the region from the first phase to the last; between two phases they only look
at a counter. For a small model that is most of a step's time saved: a decode has tens of phases of
some ten microseconds each, about what it takes to wake a thread up.

Most works are packed once, since weights are the same for all steps, activations until a step needs
larger ones, and the number of rows is in the table of phases; of the four that name a step's own
arrays only those are written down again. A product's work belongs to one layer, whose weight may be
of another kind than the next one's; all other works are for all layers.

Activations are float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from .attention import Attention, attend_tile, make_scratch
from .kernel import Packed, signature_of
from .norms import FEW, Heads, Norm, Pick, normalise, pick, rotate
from .products import (
    Call,
    Gated,
    PackedWeight,
    Quantised,
    count_few,
    count_items,
    make_quantised,
    make_tiles,
)
from .region import Phase, Task, compile_all, run_phases
from .step import Activations, BodyStep, Ends, Layers

Array = np.ndarray[Any, Any]

(
    INPUT_NORM,
    QUANTISE_QKV,
    QKV,
    ROTATE,
    ATTEND,
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
) = range(15)
"""The kinds of phases: those of a layer, and those after the layers. The last norm is a phase of
the first kind."""
LAYER_PHASES, LAST_PHASES, PRODUCTS = 12, 3, (QKV, OUTPUT, GATE_UP, DOWN, HEAD)
Place = tuple[int, int | None]
"""A kind of phases, and for those that differ by layer the layer."""
KERNEL, WORK, ITEMS, LAYER, ROWS, CHUNK = range(len(Phase._fields))
"""The columns of the table of phases."""
NO_SOFTCAP = np.float32(0)
_NO_UPDATES = np.empty((0, 1), np.float32)


class Adapted(Protocol):
    """The LoRA adapters of a step; `lora.deltas.AdaptedStep`."""

    token_slots: Array
    """The slot of each token, −1 for none; empty if no token has an adapter."""
    gate_up: Array
    """As `deltas` of `products.GatedProduct`."""

    def insert(self, table: Array, activations: Activations, num_threads: int) -> Array:
        """Return a table of phases with the adapters' phases among them."""


class Scratch(NamedTuple):
    """Memory in which threads work, made by `products.make_tiles` and `attention.make_scratch`:
    each thread has its own, but for `room`."""

    tiles: Any
    attention: tuple[Array, ...]
    room: Quantised
    """Rows of one product at a time, quantised; all threads read them."""


class Body:
    """A model's weights, ready to run steps."""

    def __init__(self, ends: Ends, layers: Layers) -> None:
        self._ends = ends
        self._layers = layers
        self._activations: Activations | None = None
        self._scratch: Scratch | None = None
        num_layers = len(layers.scales)
        self._mixtures = [layer for layer, weight in enumerate(layers.down) if weight is None]
        self._num_phases = num_layers * LAYER_PHASES + 1 + LAST_PHASES
        self._table = np.zeros((self._num_phases, len(Phase._fields)), dtype=np.int64)
        self._table[:, LAYER] = np.arange(self._num_phases) // LAYER_PHASES
        self._packed: dict[Place, Packed] = {}
        """The works that are in the table now."""
        self._counts = (0, 0, 0)
        """Tokens, picks and tiles that the table is for."""

    def run(
        self,
        cache: Array,
        step: BodyStep,
        activations: Activations,
        num_threads: int,
        adapted: Adapted | None = None,
        mix: Callable[[int], None] | None = None,
    ) -> None:
        """Run a step. Changes the activations and the cache `[places, 2, blocks, kv_heads,
        block_size, head_dim]`. `mix` runs the mixture of experts of a layer, from `normed` into
        `update`; it is needed if there are any."""
        scratch = self._scratch_for(activations, cache.shape[3], step.tile_queries, num_threads)
        calls = step_calls(self._ends, self._layers, cache, step, activations, scratch)
        # 1. The works that last: packed again if the activations or the scratch have grown.
        if activations is not self._activations or scratch is not self._scratch:
            is_first = self._activations is None
            self._activations, self._scratch = activations, scratch
            calls |= lasting_calls(self._ends, self._layers, activations, scratch)
            if is_first:
                compile_all(tasks_of(calls))
        # 2. Those, and the works of this step.
        for place, call in calls.items():
            self._set_call(place, call)
        # 3. How many items and rows. From one decode to the next they are often the same.
        counts = (len(step.input_ids), len(step.picks), len(step.tiles))
        if counts != self._counts:
            self._counts = counts
            self._set_counts(*counts, cache.shape[3])
        table = self._table
        if adapted is not None:
            self._set_adapters(adapted)
            if len(adapted.token_slots):
                table = adapted.insert(table, activations, num_threads)
        # 4. The phases, as far as the next mixture.
        begin = 0
        for layer in self._mixtures:
            assert mix is not None and table is self._table
            end = layer * LAYER_PHASES + MLP_NORM + 1
            run_phases(table[begin:end], num_threads)
            mix(layer)
            begin = end
        run_phases(table[begin:], num_threads)

    def _set_adapters(self, adapted: Adapted) -> None:
        """Let gate and up read what the adapters of this step add to them."""
        for layer in range(len(self._layers.gate_up)):
            packed = self._packed[GATE_UP, layer]
            work = cast(Gated, packed.work)
            if work.slots is adapted.token_slots:
                return  # as in all other layers
            is_alike = packed.update(
                work._replace(slots=adapted.token_slots, deltas=adapted.gate_up)
            )
            assert is_alike

    def _phases(self, place: Place) -> slice:
        """Return the phases of a place: of a kind in all layers, for the first kind with the last
        norm; or in one layer."""
        kind, layer = place
        if layer is not None:
            phase = layer * LAYER_PHASES + kind
        elif kind < LAYER_PHASES:
            if kind == INPUT_NORM and self._ends.packed is not None:
                kind += LAYER_PHASES  # the first one has a kernel of its own
            return slice(kind, self._num_phases - LAST_PHASES, LAYER_PHASES)
        else:
            phase = self._num_phases - LAST_PHASES + kind - LAYER_PHASES
        return slice(phase, phase + 1)

    def _set_call(self, place: Place, call: Call) -> None:
        """Put a kernel and its work into the table."""
        kernel, work = call
        packed = self._packed.get(place)
        if packed is not None and packed.update(work):
            return
        packed = self._packed[place] = Packed(work)
        phases = self._phases(place)
        self._table[phases, KERNEL] = kernel.address(work)
        self._table[phases, WORK] = packed.address
        self._table[phases, CHUNK] = kernel.chunk

    def _set_counts(self, tokens: int, picks: int, tiles: int, kv_heads: int) -> None:
        """Set the number of items of each phase, and of rows: all tokens, and after the layers
        only the picks."""
        few = -(-tokens // FEW)
        items: dict[Place, int] = {
            (INPUT_NORM, None): few,
            (INPUT_NORM, 0): few,
            (ROTATE, None): few,
            (ATTEND, None): tiles * kv_heads,
            (MLP_NORM, None): few,
            (PICK, None): -(-picks // FEW),
        }
        for (kind, layer), weight in products_of(self._ends, self._layers):
            rows = picks if kind == HEAD else tokens
            panels = weight.num_panels // 2 if kind == GATE_UP else weight.num_panels
            items[kind, layer] = count_items(panels, rows)
            if weight.num_groups:
                items[kind - 1, layer] = count_few(rows)
        for place, number in items.items():
            self._table[self._phases(place), ITEMS] = number
        self._table[:, ROWS] = tokens
        self._table[-LAST_PHASES:, ROWS] = picks

    def _scratch_for(
        self, activations: Activations, kv_heads: int, tile_queries: int, num_threads: int
    ) -> Scratch:
        """Return scratch for so many threads and tiles of so many queries, and for the rows of
        these activations: the present one if it is large enough."""
        _, heads, head_dim = activations.query.shape
        rows, kept = heads // kv_heads * tile_queries, self._scratch
        if kept is not None:
            kept_threads, _, kept_rows = kept.attention[1].shape
            is_same = activations is self._activations
            if is_same and kept_threads >= num_threads and kept_rows >= rows:
                return kept
            num_threads, rows = max(num_threads, kept_threads), max(rows, kept_rows)
        attention = make_scratch(num_threads, rows, head_dim)
        return Scratch(make_tiles(num_threads), attention, self._make_room(activations))

    def _make_room(self, activations: Activations) -> Quantised:
        """Return room for the quantised rows of whichever product needs most."""
        weights = [weight for _, weight in products_of(self._ends, self._layers)]
        depth = max(weight.depth for weight in weights)
        rows = max(len(activations.x), len(activations.picked))
        return make_quantised(rows, depth, max(weight.num_groups for weight in weights))


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
    calls: dict[Place, Call] = {(MLP_NORM, None): (normalise, norm)}
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


def _updates_of(layers: Layers, activations: Activations) -> Array:
    """Return the updates that a norm adds first; none if the products have added them."""
    updates: Array = activations.update
    return updates if layers.norms_updates else _NO_UPDATES


def tasks_of(calls: Mapping[Place, Call]) -> list[Task]:
    """Return the kernels of a step, and what they are compiled for. The longest is the last."""
    tasks = {(kernel, signature_of(work)): None for kernel, work in calls.values()}
    return sorted(tasks, key=lambda task: task[0] is attend_tile)
