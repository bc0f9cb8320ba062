"""A step of a Llama-shaped model on the CPU in one parallel region, compiled by Numba.

A layer is eight phases, each cut into items that threads take as they get free:

    norm ─ Q, K, V ─ rotate, store ─ attend ─ output product, += x ─
    norm ─ gate, up, SiLU·mul ─ down product, += x

and after the layers come the last norm, the rows whose logits are wanted, and the head's product.

A phase begins when all items of the one before are done, which threads see from a counter. So a
small step pays for no wake-ups between its layers, and a thread that has lost its core, to the
HTTP process, say, holds up nobody unless it has taken an item.

Activations are float32 throughout.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from .attention import Batch, Scoring, attend_item, make_scratch
from .norms import norm_row, rotate_and_store
from .numbers import FAST, INLINED, PARALLEL, fetch_add, load, to_float, yield_core
from .panels import PANEL_COLUMNS
from .products import ROWS, multiply, multiply_gated

PHASES = 8
"""Of a layer; its first one serves for the last norm."""
PICK, HEAD = PHASES, PHASES + 1
"""The phases after that."""
FEW = 32
"""Rows of an item of the phases that make no product; as many tokens as share cache lines of
their transposed keys, or more."""
LINE = 16
"""Counters apart: two cache lines, so that they never share one."""
SPINS = 500
"""How often a thread looks for a phase's end before it lets others have its core."""


class Layers(NamedTuple):
    """The weights of all layers, stacked, as `cpu_products` has them. For gate and up, panel 2i is
    the i-th of gate, 2i + 1 of up.

    Norms `[num_layers, hidden_size]`, the body's last one following those of the layers' inputs;
    qk_norm `[num_layers, heads + kv_heads, head_dim]`; epsilons `[num_layers + 1, 3]` of the
    input's norm, of Q's and K's (-1: they have none), of the second; scales and windows (0: none)
    `[num_layers]`. Flat, since Numba's parallel loops take no nested tuples.
    """

    input_norm: Any
    qkv: Any
    qkv_affine: Any
    qk_norm: Any
    output: Any
    output_affine: Any
    mlp_norm: Any
    gate_up: Any
    gate_up_affine: Any
    down: Any
    down_affine: Any
    epsilons: Any
    scales: Any
    windows: Any


class Ends(NamedTuple):
    """What a model begins and ends with: embedding `[vocab_size, hidden_size]`; the head as
    `cpu_products` has it, with no panels where it is not a plain product."""

    embedding: Any
    head: Any
    head_affine: Any


class Step(NamedTuple):
    """Which token, and where it stands: its slot `[T]`; its row `[T]` of cos and sin `[.,
    head_dim]`, which are as in Rotation; which tokens need logits `[R]`; the rest as in
    `cpu_attention.Batch`."""

    input_ids: Any
    picks: Any
    slots: Any
    rotations: Any
    cos: Any
    sin: Any
    block_table: Any
    starts: Any
    seq_lens: Any
    tiles: Any
    members: Any
    tile_queries: int


class Activations(NamedTuple):
    """float32: x `[., hidden_size]`, normed like x (out: hidden states), qkv `[., heads + 2
    kv_heads, head_dim]`, query and attended `[., heads, head_dim]`, gated `[.,
    intermediate_size]`; of the picks, picked `[., hidden_size]` and logits `[., vocab_size]`
    (out)."""

    x: Any
    normed: Any
    qkv: Any
    query: Any
    attended: Any
    gated: Any
    picked: Any
    logits: Any


@njit(**PARALLEL)
def run_model(ends, layers, cache, step, activations, num_threads):
    """cache `[num_layers, 2, blocks, kv_heads, block_size, head_dim]`; changes it and
    activations."""
    counters = np.zeros((len(layers.scales) * PHASES + 3) * 2 * LINE, dtype=np.int64)
    items = _count_items(ends, layers, step, cache.shape[3])
    for _ in prange(num_threads):
        _run_phases(ends, layers, cache, step, activations, items, counters)


@njit(**INLINED)
def _count_items(ends, layers, step, kv_heads):
    """Of each kind of phase."""
    tokens, picks = len(step.slots), len(step.picks)
    of_rows, chunks = -(-tokens // FEW), -(-tokens // ROWS)
    return np.array(
        [
            of_rows,
            layers.qkv.shape[1] * chunks,
            of_rows,
            len(step.tiles) * kv_heads,
            layers.output.shape[1] * chunks,
            of_rows,
            layers.gate_up.shape[1] // 2 * chunks,
            layers.down.shape[1] * chunks,
            -(-picks // FEW),
            len(ends.head) * -(-picks // ROWS),
        ]
    )


@njit(**FAST)
def _run_phases(ends, layers, cache, step, activations, items, counters):
    """One thread's share."""
    heads, head_dim = activations.query.shape[1], activations.query.shape[2]
    scratch = make_scratch(heads // cache.shape[3] * step.tile_queries, head_dim)
    tiles = np.empty((2, ROWS, PANEL_COLUMNS), dtype=np.float32)
    last = len(layers.scales) * PHASES
    for phase in range(last + 3):
        layer, kind = divmod(phase, PHASES)
        if phase > last:
            kind = PICK + phase - last - 1
        taken, done = 2 * LINE * phase, 2 * LINE * phase + LINE
        while load(counters, taken) < items[kind]:
            item = fetch_add(counters, taken, 1)
            if item < items[kind]:
                if kind < PHASES:
                    _run_item(
                        kind, item, ends, layers, layer, cache, step, activations, scratch, tiles
                    )
                else:
                    _run_last_item(kind, item, ends, step, activations, tiles)
                fetch_add(counters, done, 1)
        spins = 0
        while load(counters, done) < items[kind]:
            spins += 1
            if spins > SPINS:
                yield_core()


@njit(**INLINED)
def _run_item(kind, item, ends, layers, layer, cache, step, activations, scratch, tiles):
    x, normed, qkv, query, attended, gated, _, _ = activations
    tokens, epsilons = len(step.slots), layers.epsilons[layer]
    first, last = item * FEW, min(item * FEW + FEW, tokens)
    if kind == 0:
        for row in range(first, last):
            if layer == 0:
                _embed(ends.embedding[step.input_ids[row]], x[row])
            norm_row(x[row], layers.input_norm[layer], epsilons[0], normed[row])
    elif kind == 1:
        out = qkv.reshape(len(qkv), qkv.shape[1] * qkv.shape[2])
        multiply(
            item, layers.qkv[layer], layers.qkv_affine[layer], normed, tokens, tiles[0], out, False
        )
    elif kind == 2:
        rotate_and_store(
            first,
            last,
            qkv,
            layers.qk_norm[layer],
            epsilons[1],
            step.cos,
            step.sin,
            step.rotations,
            step.slots,
            cache[layer],
            query,
        )
    elif kind == 3:
        batch = Batch(
            step.block_table,
            step.starts,
            step.seq_lens,
            step.tiles,
            step.members,
            step.tile_queries,
        )
        scale, window = layers.scales[layer], layers.windows[layer]
        scoring = Scoring(scale, window, np.float32(0), layers.scales, False)
        attend_item(item, query, cache[layer], batch, scoring, attended, scratch)
    elif kind == 4:
        rows = attended.reshape(len(attended), attended.shape[1] * attended.shape[2])
        multiply(
            item, layers.output[layer], layers.output_affine[layer], rows, tokens, tiles[0], x, True
        )
    elif kind == 5:
        for row in range(first, last):
            norm_row(x[row], layers.mlp_norm[layer], epsilons[2], normed[row])
    elif kind == 6:
        multiply_gated(
            item, layers.gate_up[layer], layers.gate_up_affine[layer], normed, tokens, tiles, gated
        )
    else:
        multiply(
            item, layers.down[layer], layers.down_affine[layer], gated, tokens, tiles[0], x, True
        )


@njit(**INLINED)
def _run_last_item(kind, item, ends, step, activations, tiles):
    if kind == PICK:
        for row in range(item * FEW, min(item * FEW + FEW, len(step.picks))):
            activations.picked[row] = activations.normed[step.picks[row]]
    else:
        picks, picked, logits = len(step.picks), activations.picked, activations.logits
        multiply(item, ends.head, ends.head_affine, picked, picks, tiles[0], logits, False)


@njit(**INLINED)
def _embed(embedding, x):
    for dim in range(len(x)):
        x[dim] = to_float(embedding[dim])
