"""A step of a Llama-shaped model on the CPU, from token ids to logits, in one parallel region.

Theory of operation
-------------------
A layer is eight phases (`region.py`), each cut into items that threads take as they get free:

    normalise ─ Q, K, V ─ rotate, store ─ attend ─ output product, += x ─
    normalise ─ gate, up, SiLU·mul ─ down product, += x

and after the layers come the last norm, the rows whose logits are wanted, and the head's product.

The threads stay in the region from the first phase to the last; between two phases they only look
at a counter. For a small model that is most of a step's time saved: a decode has tens of phases of
some ten microseconds each, about what it takes to wake a thread up.

What a phase works on depends little on the step. The weights are the same for all steps, the
activations until a step needs larger ones, and how many rows there are is in the table of phases.
So most works are packed once, and of the four that name a step's own arrays only those are written
down again.

Activations are float32 throughout.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from .attention import Attention, attend_tile, make_scratch
from .compiling import Task, compile_all
from .kernel import Kernel, Packed, Work, signature_of
from .norms import FEW, Heads, Norm, Pick, normalise, pick, rotate
from .products import GatedProduct, Product, count_items, make_tiles, multiply, multiply_gated
from .region import Phase, run_phases

Array = np.ndarray[Any, Any]

KERNELS: tuple[Kernel, ...] = (
    normalise,
    multiply,
    rotate,
    attend_tile,
    multiply,
    normalise,
    multiply_gated,
    multiply,
    pick,
    multiply,
)
"""The kinds of phases: those of a layer, and those after the layers. The last norm is a phase of
the first kind."""
LAYER_PHASES = 8
INPUT_NORM, QKV, ROTATE, ATTEND, OUTPUT, MLP_NORM, GATE_UP, DOWN, PICK, HEAD = range(len(KERNELS))
KERNEL, WORK, ITEMS, LAYER, ROWS = range(len(Phase._fields))
"""The columns of the table of phases."""
NO_SOFTCAP = np.float32(0)


class Layers(NamedTuple):
    """The weights of all layers, stacked; products as in `products.Product`.

    For gate and up, panel 2i is the i-th of gate, 2i + 1 of up.
    """

    input_norm: Any
    """`[num_layers + 1, hidden_size]`; the last one is the body's own."""
    qkv: Any
    qkv_affine: Any
    qk_norm: Any
    """`[num_layers, heads + kv_heads, head_dim]`."""
    output: Any
    output_affine: Any
    mlp_norm: Any
    """`[num_layers, hidden_size]`."""
    gate_up: Any
    gate_up_affine: Any
    down: Any
    down_affine: Any
    input_epsilons: Any
    """`[num_layers + 1]`."""
    qk_epsilons: Any
    """`[num_layers]`, -1 if Q and K have no norms."""
    mlp_epsilons: Any
    """`[num_layers]`."""
    scales: Any
    """`[num_layers]`."""
    windows: Any
    """`[num_layers]`, 0 if a layer has none."""


class Ends(NamedTuple):
    """What a model begins and ends with."""

    embedding: Any
    """`[vocab_size, hidden_size]`."""
    head: Any
    """As in `products.run_product`; without panels if the head is not a plain product."""
    head_affine: Any


class BodyStep(NamedTuple):
    """The tokens of a step."""

    input_ids: Any
    """`[T]`."""
    picks: Any
    """Which tokens need logits, `[R]`."""
    slots: Any
    """The cache slot of each token, `[T]`."""
    rotations: Any
    """The row of cos and sin of each token, `[T]`."""
    cos: Any
    """`[., head_dim]`, as in Rotation."""
    sin: Any
    block_table: Any
    """This and the rest are as in `attention.Batch`."""
    starts: Any
    seq_lens: Any
    tiles: Any
    members: Any
    tile_queries: int


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


class Adapted(Protocol):
    """The LoRA adapters of a step; `lora.deltas.AdaptedStep`."""

    token_slots: Array
    """The slot of each token, −1 for none; empty if no token has an adapter."""
    gate_up: Array
    """As `deltas` of `products.GatedProduct`."""

    def insert(self, table: Array, activations: Activations, num_threads: int) -> Array:
        """Return a table of phases with the adapters' phases among them."""


class Scratch(NamedTuple):
    """Memory that each thread has for itself."""

    tiles: Any
    """Made by `products.make_tiles`."""
    attention: tuple[Array, ...]
    """Made by `attention.make_scratch`."""


class Body:
    """A model's weights, ready to run steps."""

    def __init__(self, ends: Ends, layers: Layers) -> None:
        self._ends = ends
        self._layers = layers
        self._activations: Activations | None = None
        self._scratch: Scratch | None = None
        num_layers = len(layers.scales)
        self._num_phases = num_layers * LAYER_PHASES + 3
        self._table = np.zeros((self._num_phases, len(Phase._fields)), dtype=np.int64)
        self._table[:, LAYER] = np.arange(self._num_phases) // LAYER_PHASES
        self._table[-2:, LAYER] = 0  # pick and head have one
        self._packed: dict[int, Packed] = {}
        """By kind, the work that is in the table now."""
        self._counts = (0, 0, 0)
        """Tokens, picks and tiles that the table is for."""

    def run(
        self,
        cache: Array,
        step: BodyStep,
        activations: Activations,
        num_threads: int,
        adapted: Adapted | None = None,
    ) -> None:
        """Run a step. Changes the activations and the cache `[num_layers, 2, blocks, kv_heads,
        block_size, head_dim]`."""
        # 0. The kernels, at the first step.
        if self._activations is None:
            ends, layers = self._ends, self._layers
            head = ends.head if len(ends.head) else layers.qkv
            compile_all(body_tasks(ends.embedding.dtype, layers.qkv.dtype, head.dtype))
        # 1. The works that last: packed again if the activations or the scratch have grown.
        scratch = self._scratch_for(activations, cache.shape[3], step.tile_queries, num_threads)
        if activations is not self._activations or scratch is not self._scratch:
            self._activations, self._scratch = activations, scratch
            for kind, work in lasting_works(self._ends, self._layers, activations, scratch).items():
                self._set_work(kind, work)
        # 2. The works of this step.
        works = step_works(self._ends, self._layers, cache, step, activations, scratch)
        for kind, work in works.items():
            self._set_work(kind, work)
        # 3. How many items and rows. From one decode to the next they are often the same.
        counts = (len(step.slots), len(step.picks), len(step.tiles))
        if counts != self._counts:
            self._counts = counts
            self._set_counts(*counts, cache.shape[3])
        table = self._table
        if adapted is not None:
            self._set_adapters(adapted)
            if len(adapted.token_slots):
                table = adapted.insert(table, activations, num_threads)
        run_phases(table, num_threads)

    def _set_adapters(self, adapted: Adapted) -> None:
        """Let gate and up read what the adapters of this step add to them."""
        work = self._packed[GATE_UP].work
        assert isinstance(work, GatedProduct)
        if work.slots is not adapted.token_slots:
            self._set_work(
                GATE_UP, work._replace(slots=adapted.token_slots, deltas=adapted.gate_up)
            )

    def _phases(self, kind: int) -> slice:
        """Return the phases of a kind: one in each layer, and for the first kind the last norm."""
        if kind < LAYER_PHASES:
            return slice(kind, self._num_phases - 2, LAYER_PHASES)
        phase = self._num_phases - len(KERNELS) + kind
        return slice(phase, phase + 1)

    def _set_work(self, kind: int, work: Work) -> None:
        """Put a work into the table, and the kernel for it."""
        packed = self._packed.get(kind)
        if packed is not None and packed.update(work):
            return
        packed = self._packed[kind] = Packed(work)
        phases = self._phases(kind)
        self._table[phases, KERNEL] = KERNELS[kind].address(work)
        self._table[phases, WORK] = id(packed.words)

    def _set_counts(self, tokens: int, picks: int, tiles: int, kv_heads: int) -> None:
        """Set the number of items of each kind of phase, and of rows: all tokens, and for the
        last two kinds only the picks."""
        layers, few = self._layers, -(-tokens // FEW)
        items = {
            INPUT_NORM: few,
            QKV: count_items(layers.qkv.shape[1], tokens),
            ROTATE: few,
            ATTEND: tiles * kv_heads,
            OUTPUT: count_items(layers.output.shape[1], tokens),
            MLP_NORM: few,
            GATE_UP: count_items(layers.gate_up.shape[1] // 2, tokens),
            DOWN: count_items(layers.down.shape[1], tokens),
            PICK: -(-picks // FEW),
            HEAD: count_items(len(self._ends.head), picks),
        }
        for kind, number in items.items():
            self._table[self._phases(kind), ITEMS] = number
        self._table[:, ROWS] = tokens
        self._table[-2:, ROWS] = picks

    def _scratch_for(
        self, activations: Activations, kv_heads: int, tile_queries: int, num_threads: int
    ) -> Scratch:
        """Return scratch for so many threads and tiles of so many queries: the present one if it
        is large enough."""
        _, heads, head_dim = activations.query.shape
        rows, kept = heads // kv_heads * tile_queries, self._scratch
        if kept is not None:
            kept_threads, _, kept_rows = kept.attention[1].shape
            if kept_threads >= num_threads and kept_rows >= rows:
                return kept
            num_threads, rows = max(num_threads, kept_threads), max(rows, kept_rows)
        return Scratch(make_tiles(num_threads), make_scratch(num_threads, rows, head_dim))


def lasting_works(
    ends: Ends, layers: Layers, activations: Activations, scratch: Scratch
) -> dict[int, Work]:
    """Return the works that are the same for all steps with these activations, by kind."""
    x, normed, qkv, _, attended, gated, picked, logits = activations
    tiles, no_ids = scratch.tiles, np.empty(0, np.int64)
    qkv, attended = (part.reshape(len(part), -1) for part in (qkv, attended))
    works: dict[int, Work] = {
        QKV: Product(layers.qkv, layers.qkv_affine, normed, qkv, tiles, False),
        OUTPUT: Product(layers.output, layers.output_affine, attended, x, tiles, True),
        MLP_NORM: Norm(x, layers.mlp_norm, layers.mlp_epsilons, normed, no_ids, ends.embedding),
        GATE_UP: GatedProduct(
            *(layers.gate_up, layers.gate_up_affine, normed, gated, tiles),
            *(no_ids, np.empty((0, 1), np.float32)),
        ),
        DOWN: Product(layers.down, layers.down_affine, gated, x, tiles, True),
    }
    if len(ends.head):
        head, affine = ends.head[None], ends.head_affine[None]
        works[HEAD] = Product(head, affine, picked, logits, tiles, False)
    return works


def step_works(
    ends: Ends,
    layers: Layers,
    cache: Array,
    step: BodyStep,
    activations: Activations,
    scratch: Scratch,
) -> dict[int, Work]:
    """Return the works that change with each step, by kind."""
    x, normed, qkv, query, attended, *_ = activations
    return {
        INPUT_NORM: Norm(
            x, layers.input_norm, layers.input_epsilons, normed, step.input_ids, ends.embedding
        ),
        ROTATE: Heads(
            qkv,
            layers.qk_norm,
            layers.qk_epsilons,
            step.cos,
            step.sin,
            step.rotations,
            step.slots,
            cache,
            query,
        ),
        ATTEND: Attention(
            query,
            cache,
            step.block_table,
            step.starts,
            step.seq_lens,
            step.tiles,
            step.members,
            step.tile_queries,
            layers.scales,
            layers.windows,
            NO_SOFTCAP,
            layers.scales,
            False,
            attended,
            *scratch.attention,
        ),
        PICK: Pick(normed, step.picks, activations.picked),
    }


def body_tasks(floats: np.dtype[Any], weights: np.dtype[Any], head: np.dtype[Any]) -> list[Task]:
    """Return the kernels of a step, and what they are compiled for, if these are the types of
    embedding and KV cache, of the layers' weights, and of the head's. The longest is the last."""

    def array(dtype: Any, ndim: int) -> Array:
        return np.zeros((1,) * ndim, dtype=dtype)

    panels, affine = array(weights, 4), array(np.float32, 3)
    line, rows, words = array(np.float32, 1), array(np.float32, 2), array(np.int64, 1)
    product, heads, pairs = (panels, affine), array(np.float32, 3), array(np.int64, 2)
    layers = Layers(
        rows, *product, heads, *product, rows, *product, *product, line, line, line, line, words
    )
    ends = Ends(array(floats, 2), array(head, 3), rows)
    activations = Activations(rows, rows, heads, heads, heads, rows, rows, rows)
    table, starts = array(np.int32, 2), array(np.int32, 1)
    step = BodyStep(
        words, words, words, words, rows, rows, table, starts, starts, pairs, pairs, tile_queries=1
    )
    scratch = Scratch(make_tiles(1), make_scratch(1, 1, 1))
    works = lasting_works(ends, layers, activations, scratch)
    works |= step_works(ends, layers, array(floats, 6), step, activations, scratch)
    tasks = {(KERNELS[kind], signature_of(work)): None for kind, work in works.items()}
    return sorted(tasks, key=lambda task: task[0] is attend_tile)
