"""A step of a Llama-shaped model on the CPU, from token ids to logits, in one parallel region.

Theory of operation
-------------------
A layer is eight phases (`region.py`), each cut into items that threads take as they get free:

    normalise ─ Q, K, V ─ rotate, store ─ attend ─ output product, += x ─
    normalise ─ gate, up, SiLU·mul ─ down product, += x

and after the layers come the last norm, the rows whose logits are wanted, the head's product, and
the likeliest token of each row.
Each product has a phase before it, which quantises its input for a weight of integers, or is empty.
If a family norms its updates, the products leave them where their input was, and the norm that
comes next norms and adds them first. A mixture of experts has no phases, since the number of its
items is not known before its router has run: the region ends before it and begins again after it.

Of the last layer all tokens need K and V, since later ones attend to them. The rest is needed only
of tokens whose logits are wanted: of a prompt the last one, of a part of a prompt none. Then only
their queries attend there, their rows move to the front, and the phases that follow are as short.

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

from collections.abc import Callable
from typing import Protocol, cast

import numpy as np

from .attention import make_scratch
from .kernel import Packed
from .norms import FEW
from .products import Call, Gated, Quantised, count_few, count_items, make_quantised, make_tiles
from .region import Phase, compile_all, run_phases
from .step import (
    ATTEND,
    BEST,
    CHUNK,
    GATE_UP,
    HEAD,
    INPUT_NORM,
    ITEMS,
    KERNEL,
    LAST_PHASES,
    LAYER,
    LAYER_PHASES,
    MLP_NORM,
    MOVE,
    PICK,
    ROTATE,
    ROWS,
    WORK,
    Activations,
    Array,
    BodyStep,
    Ends,
    Layers,
    Place,
    Scratch,
    lasting_calls,
    narrow_calls,
    products_of,
    step_calls,
    tasks_of,
)


class Adapted(Protocol):
    """The LoRA adapters of a step; `lora.deltas.AdaptedStep`."""

    token_slots: Array
    """The slot of each token, −1 for none; empty if no token has an adapter."""
    gate_up: Array
    """As `deltas` of `products.GatedProduct`."""

    def insert(self, table: Array, activations: Activations, num_threads: int) -> Array:
        """Return a table of phases with the adapters' phases among them."""


class Body:
    """A model's weights, ready to run steps."""

    def __init__(self, ends: Ends, layers: Layers) -> None:
        self._ends = ends
        self._layers = layers
        self._activations: Activations | None = None
        self._scratch: Scratch | None = None
        num_layers = len(layers.scales)
        self._last = num_layers - 1
        self._mixtures = [layer for layer, weight in enumerate(layers.down) if weight is None]
        self._num_phases = num_layers * LAYER_PHASES + 1 + LAST_PHASES
        self._table = np.zeros((self._num_phases, len(Phase._fields)), dtype=np.int64)
        self._table[:, LAYER] = np.arange(self._num_phases) // LAYER_PHASES
        self._packed: dict[Place, Packed] = {}
        """The works that are in the table now."""
        self._counts = (0, 0, 0, False)
        """Tokens, picks, tiles, and whether the last layer is narrow: what the table is for."""

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
        block_size, head_dim]`. The results are in `normed`, unless the picks are enough, `picked`,
        `logits` and `best`. `mix` runs the mixture of experts of a layer, from `normed` into
        `update`; it is needed if there are any."""
        scratch = self._scratch_for(activations, cache.shape[3], step.tile_queries, num_threads)
        is_adapted = adapted is not None and len(adapted.token_slots) > 0
        narrow = not is_adapted and self._can_narrow(step)
        calls = step_calls(self._ends, self._layers, cache, step, activations, scratch)
        if narrow:
            calls |= narrow_calls(calls, activations, step.picks, self._last)
        # 1. The works that last: packed again if the activations or the scratch have grown.
        if activations is not self._activations or scratch is not self._scratch:
            is_first = self._activations is None
            self._activations, self._scratch = activations, scratch
            calls = lasting_calls(self._ends, self._layers, activations, scratch) | calls
            if is_first:
                compile_all(tasks_of(calls))
        # 2. Those, and the works of this step.
        for place, call in calls.items():
            self._set_call(place, call)
        # 3. How many items and rows. From one decode to the next they are often the same.
        counts = (len(step.input_ids), len(step.picks), len(step.tiles), narrow)
        if counts != self._counts:
            self._counts = counts
            self._set_counts(*counts, cache.shape[3])
        attention = self._packed[ATTEND, self._last if narrow else None]
        self._table[self._phases((ATTEND, self._last)), WORK] = attention.address
        table = self._table
        if adapted is not None:
            self._set_adapters(adapted)
            if is_adapted:
                table = adapted.insert(table, activations, num_threads)
        self._run_table(table, num_threads, mix)

    def _run_table(self, table: Array, num_threads: int, mix: Callable[[int], None] | None) -> None:
        """Run the phases of a table, from one mixture to the next."""
        begin = 0
        for layer in self._mixtures:
            assert mix is not None and table is self._table
            end = layer * LAYER_PHASES + MLP_NORM + 1
            run_phases(table[begin:end], num_threads)
            mix(layer)
            begin = end
        run_phases(table[begin:], num_threads)

    def _can_narrow(self, step: BodyStep) -> bool:
        """Whether the last layer may compute only the picks."""
        picks = step.picks
        is_less = step.picked_only and len(picks) < len(step.input_ids)
        return is_less and not self._mixtures and bool((picks[1:] > picks[:-1]).all())

    def _set_adapters(self, adapted: Adapted) -> None:
        """Let gate and up read what the adapters of this step add to them."""
        for layer in range(len(self._layers.gate_up)):
            packed = self._packed[GATE_UP, layer]
            work = cast(Gated, packed.work)
            if work.slots is adapted.token_slots and work.deltas is adapted.gate_up:
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

    def _set_counts(self, tokens: int, picks: int, tiles: int, narrow: bool, kv_heads: int) -> None:
        """Set the number of items of each phase, and of rows: all tokens, and after the layers
        only the picks; if the last layer is narrow, from its attention on."""
        late = picks if narrow else tokens
        few, few_late, few_picks = (-(-rows // FEW) for rows in (tokens, late, picks))
        items: dict[Place, int] = {
            (INPUT_NORM, None): few,
            (INPUT_NORM, 0): few,
            (INPUT_NORM, self._last + 1): few_late,
            (ROTATE, None): few,
            (ATTEND, None): tiles * kv_heads,
            (ATTEND, self._last): (picks if narrow else tiles) * kv_heads,
            (MOVE, self._last): 2 if narrow else 0,
            (MLP_NORM, None): few,
            (MLP_NORM, self._last): few_late,
            (PICK, None): few_picks,
            (BEST, None): picks if self._ends.head is not None else 0,
        }
        for (kind, layer), weight in products_of(self._ends, self._layers):
            is_late = layer == self._last and kind > ATTEND
            rows = picks if kind == HEAD else late if is_late else tokens
            panels = weight.num_panels // 2 if kind == GATE_UP else weight.num_panels
            items[kind, layer] = count_items(panels, rows)
            if weight.num_groups:
                items[kind - 1, layer] = count_few(rows)
        for place, number in items.items():
            self._table[self._phases(place), ITEMS] = number
        self._table[:, ROWS] = tokens
        self._table[self._phases((MOVE, self._last)).start :, ROWS] = late
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
