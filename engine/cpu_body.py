"""All layers of a Llama-shaped body on the CPU in one parallel region, compiled by Numba.

A layer is eight phases, each cut into items that threads take as they get free:

    norm ─ Q, K, V ─ rotate, store ─ attend ─ output product, += x ─
    norm ─ gate, up, SiLU·mul ─ down product, += x

and the last norm is a phase of its own.

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

from .cpu_attention import attend_item, make_scratch
from .cpu_kernels import norm_row, rotate_and_store_row
from .cpu_numbers import (
    FAST,
    INLINED,
    PANEL_COLUMNS,
    PARALLEL,
    fetch_add,
    load,
    yield_core,
)
from .cpu_products import ROWS, multiply, multiply_gated

PHASES = 8
"""Of a layer."""
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
    qk_norm `[num_layers, heads + kv_heads, head_dim]`; epsilons `[num_layers + 1, 3]` of the input's
    norm, of Q's and K's (-1: they have none), of the second; scales and windows (0: none)
    `[num_layers]`. Flat, since Numba's parallel loops take no nested tuples.
    """

    input_norm: Any
    qkv: Any
    qkv_bias: Any
    qk_norm: Any
    output: Any
    output_bias: Any
    mlp_norm: Any
    gate_up: Any
    gate_up_bias: Any
    down: Any
    down_bias: Any
    epsilons: Any
    scales: Any
    windows: Any


class Step(NamedTuple):
    """Where each token stands: its slot `[T]`; its row `[T]` of cos and sin `[., head_dim]`, which
    are as in Rotation; the rest as `cpu_attention.attend` takes it."""

    slots: Any
    rotations: Any
    cos: Any
    sin: Any
    block_table: Any
    starts: Any
    seq_lens: Any
    tiles: Any
    tile_queries: int


class Activations(NamedTuple):
    """float32, rows rounded up to PANEL_ROWS: x `[., hidden_size]` (in: embeddings), normed like x
    (out: hidden states), qkv `[., heads + 2 kv_heads, head_dim]`, query and attended `[., heads,
    head_dim]`, gated `[., intermediate_size]`."""

    x: Any
    normed: Any
    qkv: Any
    query: Any
    attended: Any
    gated: Any


@njit(**PARALLEL)
def run_body(layers, cache, step, activations, num_threads):
    """cache `[num_layers, 2, blocks, kv_heads, block_size, head_dim]`; changes it and
    activations."""
    counters = np.zeros((len(layers.scales) * PHASES + 1) * 2 * LINE, dtype=np.int64)
    items = _count_items(layers, step, cache.shape[3])
    for _ in prange(num_threads):
        _run_phases(layers, cache, step, activations, items, counters)


@njit(**INLINED)
def _count_items(layers, step, kv_heads):
    """Of each phase of a layer."""
    tokens = len(step.slots)
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
        ]
    )


@njit(**FAST)
def _run_phases(layers, cache, step, activations, items, counters):
    """One thread's share."""
    heads, head_dim = activations.query.shape[1], activations.query.shape[2]
    scratch = make_scratch(heads // cache.shape[3] * step.tile_queries, head_dim)
    tiles = np.empty((2, ROWS, PANEL_COLUMNS), dtype=np.float32)
    for phase in range(len(layers.scales) * PHASES + 1):
        layer, kind = divmod(phase, PHASES)
        taken, done = 2 * LINE * phase, 2 * LINE * phase + LINE
        while load(counters, taken) < items[kind]:
            item = fetch_add(counters, taken, 1)
            if item < items[kind]:
                _run_item(kind, item, layers, layer, cache, step, activations, scratch, tiles)
                fetch_add(counters, done, 1)
        spins = 0
        while load(counters, done) < items[kind]:
            spins += 1
            if spins > SPINS:
                yield_core()


@njit(**INLINED)
def _run_item(kind, item, layers, layer, cache, step, activations, scratch, tiles):
    x, normed, qkv, query, attended, gated = activations
    tokens, epsilons = len(step.slots), layers.epsilons[layer]
    first, last = item * FEW, min(item * FEW + FEW, tokens)
    if kind == 0:
        for row in range(first, last):
            norm_row(x[row], layers.input_norm[layer], epsilons[0], normed[row])
    elif kind == 1:
        out = qkv.reshape(len(qkv), qkv.shape[1] * qkv.shape[2])
        multiply(
            item, layers.qkv[layer], layers.qkv_bias[layer], normed, tokens, tiles[0], out, False
        )
    elif kind == 2:
        for row in range(first, last):
            rotation = step.rotations[row]
            rotate_and_store_row(
                qkv[row],
                layers.qk_norm[layer],
                epsilons[1],
                step.cos[rotation],
                step.sin[rotation],
                step.slots[row],
                cache[layer],
                query[row],
            )
    elif kind == 3:
        attend_item(
            item,
            query,
            cache[layer],
            step.block_table,
            step.starts,
            step.seq_lens,
            step.tiles,
            step.tile_queries,
            layers.scales[layer],
            layers.windows[layer],
            np.float32(0),
            layers.scales,
            False,
            attended,
            scratch,
        )
    elif kind == 4:
        rows = attended.reshape(len(attended), attended.shape[1] * attended.shape[2])
        multiply(
            item, layers.output[layer], layers.output_bias[layer], rows, tokens, tiles[0], x, True
        )
    elif kind == 5:
        for row in range(first, last):
            norm_row(x[row], layers.mlp_norm[layer], epsilons[2], normed[row])
    elif kind == 6:
        multiply_gated(
            item, layers.gate_up[layer], layers.gate_up_bias[layer], normed, tokens, tiles, gated
        )
    else:
        multiply(
            item, layers.down[layer], layers.down_bias[layer], gated, tokens, tiles[0], x, True
        )
