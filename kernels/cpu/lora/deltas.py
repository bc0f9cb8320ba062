"""The kernel that adds what adapters add, and its place among the phases of a step.

An item is a run: tokens that follow each other and have the same adapter. For each part of the
product it computes h = A x, then B h, panel by panel, with sums in the order of the features. So a
row's result does not depend on the run that it is in, and rows without an adapter are not touched.

    S-LoRA (arXiv 2311.03285) and Punica (arXiv 2310.18547) gather rows in the same way; there the
    two products are two kernels. Here h stays in the cache of the thread that computes both.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ..kernel import Packed, kernel, signature_of
from ..numbers import FAST
from ..panels import PANEL_COLUMNS, multiply_add
from ..products import DEPTH
from ..region import launch
from ..step import (
    DOWN,
    GATE_UP,
    ITEMS,
    KERNEL,
    LAYER,
    LAYER_PHASES,
    MLP_NORM,
    OUTPUT,
    QKV,
    ROWS,
    WORK,
    Activations,
)
from .slots import Array, Slots

RUN_ROWS = 24
"""Maximum rows of a run: enough that its weights are read once for many, few enough that the
chunk of a prompt keeps all threads busy."""


class Deltas(NamedTuple):
    """The work of `add_deltas`. x and out may have more rows than the step."""

    a: Any
    """This and the next three are as in `Slots`."""
    b: Any
    ranks: Any
    parts: Any
    x: Any
    """float32 `[., in_features]`."""
    out: Any
    """float32 `[., out_features]`."""
    runs: Any
    """int64 `[., 3]`: slot, first row and number of rows of each run."""
    hidden: Any
    """Scratch `[threads, RUN_ROWS, max_rank rounded up to panels]`."""
    tiles: Any
    """Scratch `[threads, RUN_ROWS, PANEL_COLUMNS]`."""
    adds: bool
    """Whether to add to `out`; otherwise the rows of the runs are overwritten."""


@kernel
def add_deltas(item, layer, rows, thread, work):
    """Compute the run `item`."""
    a, b, ranks, parts = work.a, work.b, work.ranks, work.parts
    x, out, runs, adds = work.x, work.out, work.runs, work.adds
    h, tile = work.hidden[thread], work.tiles[thread]
    slot, first, count = runs[item, 0], np.uint64(runs[item, 1]), np.uint64(runs[item, 2])
    depth, rank_panels = x.shape[1], a.shape[2] // len(parts)
    for part in range(len(parts)):
        rank = ranks[slot, layer, part]
        if rank == 0 and adds:
            continue
        # 1. h = A x. A slice of A stays in the second-level cache while all rows read it.
        used = -(-rank // PANEL_COLUMNS)
        _clear(h, count, np.uint64(used * PANEL_COLUMNS))
        for panel in range(used):
            weights, at = a[slot, layer, part * rank_panels + panel], panel * PANEL_COLUMNS
            for begin in range(0, depth, DEPTH):
                step, place = min(DEPTH, depth - begin), begin * PANEL_COLUMNS
                multiply_add(x, first, begin, weights, place, PANEL_COLUMNS, step, h, 0, at, count)
        # 2. B h, panel by panel, into the part's columns.
        for panel in range(parts[part, 1]):
            _clear(tile, count, np.uint64(PANEL_COLUMNS))
            weights = b[slot, layer, parts[part, 0] + panel]
            multiply_add(h, 0, 0, weights, 0, PANEL_COLUMNS, rank, tile, 0, 0, count)
            begin = panel * PANEL_COLUMNS
            left = np.uint64(parts[part, 2] + begin)
            columns = np.uint64(min(PANEL_COLUMNS, parts[part, 3] - begin))
            _put(tile, out, first, left, count, columns, adds)


# Functions of their own: within the kernel's loops LLVM would not vectorise these.


@njit(**FAST)
def _clear(tile, rows, columns):
    """Zero the first rows and columns of a tile."""
    for row in range(rows):
        for column in range(columns):
            tile[row, column] = np.float32(0)


@njit(**FAST)
def _put(tile, out, first, left, rows, columns, adds):
    """Add the first rows and columns of a tile to those of `out`, or put them there."""
    for row in range(rows):
        if adds:
            for column in range(columns):
                out[first + row, left + column] += tile[row, column]
        else:
            for column in range(columns):
                out[first + row, left + column] = tile[row, column]


def find_runs(token_slots: Array) -> Array:
    """Return the runs `[., 3]` of a step whose tokens have these slots `[T]`, −1 for none."""
    edges = np.nonzero(np.diff(token_slots))[0] + 1
    begins = np.concatenate(([0], edges))
    ends = np.concatenate((edges, [len(token_slots)]))
    runs = [
        (token_slots[begin], first, min(RUN_ROWS, end - first))
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        if begin < end and token_slots[begin] >= 0
        for first in range(begin, end, RUN_ROWS)
    ]
    return np.array(runs, dtype=np.int64).reshape(-1, 3)


def make_scratch(num_threads: int, max_rank: int) -> tuple[Array, Array]:
    """Return `hidden` and `tiles` of a work for so many threads."""
    width = -(-max_rank // PANEL_COLUMNS) * PANEL_COLUMNS
    hidden = np.zeros((num_threads, RUN_ROWS, width), np.float32)
    return hidden, np.zeros((num_threads, RUN_ROWS, PANEL_COLUMNS), np.float32)


def run_deltas(slots: Slots, x: Array, out: Array, runs: Array, num_threads: int) -> None:
    """Compute the rows of `runs` of out `[., out_features]`, for slots of one layer. The other
    rows are left as they are."""
    scratch = make_scratch(num_threads, slots.b.shape[3])
    work = Deltas(*slots, x, out, runs, *scratch, False)
    launch(add_deltas, work, len(runs), len(x), num_threads)


def compile_deltas() -> None:
    """Compile the kernel, or load it from the cache on disk, before any request needs it."""
    row, slots = np.zeros((1, 1), np.float32), Slots.allocate(1, 1, 1, (1,), 1)
    runs = find_runs(np.empty(0, np.int64))
    add_deltas.compile(signature_of(Deltas(*slots, row, row, runs, *make_scratch(1, 1), True)))


class LayerSlots(NamedTuple):
    """The slots of the products of all layers."""

    qkv: Slots
    output: Slots
    gate_up: Slots
    down: Slots


class AdaptedStep:
    """Puts the adapters' phases between those of a step.

    Each follows its product, but that of gate and up comes before it: its deltas go into a buffer
    that `multiply_gated` reads, since they must be added before the activation.
    """

    def __init__(self, slots: LayerSlots, max_rank: int) -> None:
        self._slots = slots
        self._max_rank = max_rank
        self._scratch = make_scratch(1, max_rank)
        self._packed: list[Packed] = []
        self._runs = find_runs(np.empty(0, np.int64))
        self._nobody: Array = np.empty(0, np.int64)
        self.token_slots = self._nobody
        """The slots of the step's tokens `[T]`; empty if none has an adapter."""
        self.gate_up = np.empty((0, 2), np.float32)
        """The deltas of gate and up, `[., 2 * intermediate_size]`, by token."""

    def begin(self, token_slots: Array | None) -> None:
        """Take the slots of the next step's tokens; None if none has an adapter."""
        if token_slots is None:
            self.token_slots = self._nobody
            return
        self.token_slots, self._runs = token_slots, find_runs(token_slots)
        columns = int(self._slots.gate_up.parts[:, 3].sum())
        if len(self.gate_up) < len(token_slots):
            self.gate_up = np.zeros((len(token_slots), columns), np.float32)

    def insert(self, table: Array, activations: Activations, num_threads: int) -> Array:
        """Return a step's table of phases with those of the adapters among them."""
        works = self._works(activations, num_threads)
        self._packed = [Packed(work) for work in works.values()]  # until the next step
        layers = self._slots.qkv.a.shape[1]
        # 1. Spread the phases of each layer apart, to make room for one more after each of these.
        inside, after = table[: layers * LAYER_PHASES], table[layers * LAYER_PHASES :]
        by_layer = inside.reshape(layers, LAYER_PHASES, -1)
        places = np.array([QKV, OUTPUT, MLP_NORM, DOWN]) + 1
        spread = np.insert(by_layer, places, 0, axis=1)
        # 2. Fill it.
        for at, (work, packed) in enumerate(zip(works.values(), self._packed, strict=True)):
            phase = spread[:, places[at] + at]
            phase[:, KERNEL] = add_deltas.address(work)
            phase[:, WORK] = packed.address
            phase[:, ITEMS] = len(self._runs)
            phase[:, LAYER] = np.arange(layers)
            phase[:, ROWS] = len(self.token_slots)
        return np.concatenate((spread.reshape(-1, table.shape[1]), after))

    def _works(self, activations: Activations, num_threads: int) -> dict[int, Deltas]:
        """Return the work of each product's phase, in the order of the phases."""
        if len(self._scratch[0]) < num_threads:
            self._scratch = make_scratch(num_threads, self._max_rank)
        qkv, attended = (
            part.reshape(len(part), -1) for part in (activations.qkv, activations.attended)
        )
        common = (self._runs, *self._scratch)
        slots, update, normed = self._slots, activations.update, activations.normed
        return {
            QKV: Deltas(*slots.qkv, normed, qkv, *common, True),
            OUTPUT: Deltas(*slots.output, attended, update, *common, True),
            GATE_UP: Deltas(*slots.gate_up, normed, self.gate_up, *common, False),
            DOWN: Deltas(*slots.down, activations.gated, update, *common, True),
        }
