"""A last layer that computes only the picks gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quire.engine.attention.metadata import AttentionMetadata
from quire.engine.body.flat_decoder import FlatDecoder
from quire.engine.devices.cpu.attention import CpuPlanner
from quire.engine.devices.cpu.decoder import CpuDecoder
from quire.engine.devices.cpu.packed_linear import PackedLinear
from quire.kernels.cpu import body

from .flat_layers import HEADS, HIDDEN, KV_HEADS, Rotary, make_layer, make_norm, normed_updates

VOCAB, HEAD_DIM, BLOCK_SIZE = 45, 20, 16
LENGTHS, SEQ_LENS = [1, 1, 40, 7, 3], [30, 1, 40, 20, 33]
"""New tokens and keys of each sequence: decodes, a prompt of three tiles, ends of longer ones."""
PICKS = {
    "the last of each": [0, 1, 41, 48, 51],
    "some sequences": [1, 41],
    "several of one": [0, 1, 45, 46, 47, 48],
    "none": [],
}


def make_step(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
    """Return ids and positions of a step over a cache, which is copied, and its metadata."""
    loc = np.concatenate(([0], np.cumsum(LENGTHS))).astype(np.int32)
    seq_lens = np.array(SEQ_LENS, dtype=np.int32)
    rows = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    positions = np.arange(loc[-1]) - loc[rows] + (seq_lens - LENGTHS)[rows]
    tables = np.arange(len(LENGTHS) * 3, dtype=np.int32).reshape(-1, 3)
    slots = tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    cache = cache.clone()
    metadata = AttentionMetadata(
        kv_cache=cache,
        slot_mapping=torch.from_numpy(slots.astype(np.int64)),
        block_table=torch.from_numpy(tables),
        query_start_loc=torch.from_numpy(loc),
        seq_lens=torch.from_numpy(seq_lens),
        num_decodes=2,
        max_query_len=max(LENGTHS),
        plan=CpuPlanner(HEADS, cache).cut(loc, seq_lens),
    )
    ids = torch.from_numpy(np.arange(loc[-1]) * 5 % 9)
    return ids, torch.from_numpy(positions), metadata


OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda _: {},
    "normed updates": normed_updates,
    "a window": lambda layer: {"window": 9 if layer else None},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("quantization", [None, "int8"])
@torch.no_grad()
def test_picks_alone_have_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, quantization: str | None, options: str
) -> None:
    layers = [
        make_layer(HEAD_DIM, False, torch.float32)._replace(layer_idx=i, **OPTIONS[options](i))
        for i in range(2)
    ]
    embedding = nn.Embedding(9, HIDDEN)
    flat = FlatDecoder(embedding, Rotary(HEAD_DIM), layers, make_norm(HIDDEN), 1.0)
    decoder = CpuDecoder(flat, quantization=quantization)
    run = decoder.fuse_head(PackedLinear(nn.Linear(HIDDEN, VOCAB)))
    assert run is not None
    cache = torch.randn(2, 2, len(LENGTHS) * 3, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    items: list[int] = []
    run_phases = body.run_phases

    def count_items(phases: np.ndarray[Any, Any], num_threads: int) -> None:
        items.append(int(phases[:, body.ITEMS].sum()))
        run_phases(phases, num_threads)

    monkeypatch.setattr(body, "run_phases", count_items)
    for picks in [*PICKS.values(), *PICKS.values()]:  # again, from another kind of step
        indices = torch.tensor(picks, dtype=torch.int64)
        results = []
        for picked_only in (False, True, False):
            ids, positions, metadata = make_step(cache)
            hidden, logits, _ = run(ids, positions, indices, metadata, picked_only=picked_only)
            hidden = hidden if picked_only else hidden[indices]
            results.append((hidden.clone(), logits.clone(), metadata.kv_cache))
        whole, narrow, again = results
        assert len(narrow[0]) == len(narrow[1]) == len(picks)
        for expected, actual, after in zip(whole, narrow, again, strict=True):
            assert torch.equal(actual, expected)
            assert torch.equal(after, expected)
        assert items[-2] < items[-1] == items[-3]


@torch.no_grad()
def test_picks_that_do_not_ascend_are_computed_among_all() -> None:
    flat = FlatDecoder(
        nn.Embedding(9, HIDDEN),
        Rotary(HEAD_DIM),
        [make_layer(HEAD_DIM, False, torch.float32)],
        make_norm(HIDDEN),
        1.0,
    )
    run = CpuDecoder(flat).fuse_head(PackedLinear(nn.Linear(HIDDEN, VOCAB)))
    assert run is not None
    cache = torch.randn(1, 2, len(LENGTHS) * 3, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    ids, positions, metadata = make_step(cache)
    indices = torch.tensor([41, 1, 41])
    expected = [part.clone() for part in run(ids, positions, indices, metadata)[:2]]
    hidden, logits, _ = run(ids, positions, indices, metadata, picked_only=True)
    assert torch.equal(hidden, expected[0][indices]) and torch.equal(logits, expected[1])
