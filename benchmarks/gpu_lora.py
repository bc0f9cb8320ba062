"""LoRA's two kernels on the GPU: checked against float64, and timed."""

from __future__ import annotations

import functools

import torch
from gpu_common import DEVICE, Record

from quire.kernels import reference
from quire.kernels.cuda.lora import MAX_PARTS, lora_expand, lora_shrink, rank_pad

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_adapters(
    dtype: torch.dtype, rows: int, slots: int, rank: int, features: int, sizes: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a step in which every fourth row has no adapter, as the launchers name
    them."""
    holders = torch.arange(rows)[torch.arange(rows) % 4 != 3]
    assigned = holders % slots
    order = holders[torch.argsort(assigned, stable=True)]
    loc = torch.searchsorted(assigned.sort().values, torch.arange(slots + 1))
    parts = len(sizes)
    made = {
        "x": torch.randn(rows, features),
        "a": torch.randn(slots, parts, rank, features) / features**0.5,
        "b": torch.randn(slots, sum(sizes), rank) / rank**0.5,
        "out": torch.randn(rows, sum(sizes)),
    }
    found = {name: tensor.to(DEVICE, dtype) for name, tensor in made.items()}
    ranks = torch.full((slots, parts), rank)
    ranks[0, 0] = max(1, rank // 2)
    for name, tensor in (("order", order), ("loc", loc), ("ranks", ranks)):
        found[name] = tensor.to(DEVICE, torch.int32)
    h = torch.full((MAX_PARTS, rows, rank_pad(rank)), float("nan"))
    return found | {"h": h.to(DEVICE)}


def check_adapters(
    dtype: torch.dtype, rows: int, slots: int, rank: int, features: int, sizes: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return what the kernels add to, what the reference says in float64, and whether the rows
    without an adapter are untouched."""
    step = random_adapters(dtype, rows, slots, rank, features, sizes)
    placed: Rows = (step["order"], step["loc"], step["ranks"])
    out, wanted = step["out"].clone(), step["out"].double()
    lora_shrink(step["x"], step["a"], *placed, step["h"])
    lora_expand(step["h"], step["b"], *placed, sizes, out)
    wide = step["h"].nan_to_num()
    reference.lora_shrink(step["x"], step["a"], *placed, wide)
    reference.lora_expand(wide, step["b"], *placed, sizes, wanted)
    alone = torch.arange(rows, device=DEVICE) % 4 == 3
    return out, wanted, bool((out[alone] == step["out"][alone]).all())


def calls_of_adapters(
    rows: int, slots: int, rank: int, features: int, sizes: tuple[int, ...]
) -> tuple[list[functools.partial[None]], int]:
    """Return the launches of one product, and the bytes that they move."""
    step = random_adapters(torch.bfloat16, rows, slots, rank, features, sizes)
    placed: Rows = (step["order"], step["loc"], step["ranks"])
    moved = [step["x"], step["a"], step["b"], step["out"], step["out"]]
    shrink = functools.partial(lora_shrink, step["x"], step["a"], *placed, step["h"])
    expand = functools.partial(lora_expand, step["h"], step["b"], *placed, sizes, step["out"])
    return [shrink, expand], sum(tensor.nbytes for tensor in moved)


def figures_of(record: Record, untouched: bool) -> Record:
    """Return the record of a check, failed if a row without an adapter has changed."""
    return {**record, "ok": bool(record["ok"]) and untouched}
