"""Compare shrink and expand with the reference, over odd shapes, ranks and assignments."""

from typing import Any

import numpy as np
import pytest
import torch
from paged import relative_error

from quire.kernels import reference
from quire.kernels.cuda.lora import MAX_PARTS, lora_expand, lora_shrink, rank_pad

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
"""The interpreter cannot multiply matrices of bfloat16."""


def random_step(
    token_slots: list[int],
    ranks: list[list[int]],
    features: int,
    sizes: tuple[int, ...],
    **kind: Any,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a step; slots hold garbage beyond their ranks, which nobody reads."""
    dtype, max_rank = kind.get("dtype", torch.float32), kind.get("max_rank", 20)
    slots = np.array(token_slots)
    rows = np.nonzero(slots >= 0)[0]
    order = np.zeros(len(slots) + 5, np.int32)
    order[: len(rows)] = rows[np.argsort(slots[rows], kind="stable")]
    loc = np.searchsorted(np.sort(slots[rows]), np.arange(len(ranks) + 1)).astype(np.int32)
    parts = len(sizes)
    return {
        "x": torch.randn(len(slots), features).to(dtype),
        "a": (torch.randn(len(ranks), parts, max_rank, features) / features**0.5).to(dtype),
        "b": torch.randn(len(ranks), sum(sizes), max_rank).to(dtype),
        "order": torch.from_numpy(order),
        "loc": torch.from_numpy(loc),
        "ranks": torch.tensor(ranks, dtype=torch.int32),
        "h": torch.full((MAX_PARTS, len(slots) + 2, rank_pad(max_rank)), float("nan")),
        "out": torch.randn(len(slots), sum(sizes) + 3)[:, : sum(sizes)].to(dtype),
    }


def run(kernels: Any, step: dict[str, torch.Tensor], sizes: tuple[int, ...]) -> torch.Tensor:
    h, out = step["h"].clone(), step["out"].clone()
    rows = (step["order"], step["loc"], step["ranks"])
    kernels.lora_shrink(step["x"], step["a"], *rows, h)
    kernels.lora_expand(h, step["b"], *rows, sizes, out)
    return out


class Triton:
    lora_shrink = staticmethod(lora_shrink)
    lora_expand = staticmethod(lora_expand)


CASES: list[tuple[list[int], list[list[int]], int, tuple[int, ...]]] = [
    ([0], [[4]], 33, (50,)),
    ([1, -1, 0, 1, -1], [[20, 3], [1, 0]], 130, (70, 70)),
    ([0] * 20 + [-1] + [2] * 18, [[16, 16, 16], [5, 5, 5], [0, 7, 20]], 64, (96, 16, 17)),
    ([-1, -1], [[4]], 16, (8,)),
]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_rows_with_adapters_equal_the_reference(case: int, dtype: torch.dtype) -> None:
    token_slots, ranks, features, sizes = CASES[case]
    step = random_step(token_slots, ranks, features, sizes, dtype=dtype)
    found, wanted = run(Triton, step, sizes), run(reference, step, sizes)
    assert relative_error(found, wanted) < TOLERANCES[dtype]
    untouched = [row for row, slot in enumerate(token_slots) if slot < 0]
    assert torch.equal(found[untouched], step["out"][untouched])


def test_the_reference_is_the_formula() -> None:
    token_slots, ranks, features, sizes = CASES[1]
    step = random_step(token_slots, ranks, features, sizes)
    found = run(reference, step, sizes)
    for row, slot in enumerate(token_slots):
        wanted, left = step["out"][row].clone(), 0
        for part, size in enumerate(sizes):
            rank = ranks[slot][part] if slot >= 0 else 0
            h = step["a"][slot, part, :rank] @ step["x"][row]
            wanted[left : left + size] += step["b"][slot, left : left + size, :rank] @ h
            left += size
        torch.testing.assert_close(found[row], wanted)


def test_a_row_does_not_depend_on_the_others() -> None:
    token_slots, ranks, features, sizes = CASES[2]
    step = random_step(token_slots, ranks, features, sizes)
    together = run(Triton, step, sizes)
    for row in (3, 30):
        alone = {**step, "x": step["x"][row : row + 1], "out": step["out"][row : row + 1]}
        slots = np.arange(len(ranks) + 1) > token_slots[row]
        alone["loc"] = torch.from_numpy(slots.astype(np.int32))
        alone["order"] = torch.zeros(1, dtype=torch.int32)
        assert torch.equal(run(Triton, alone, sizes)[0], together[row])


def test_wrong_arguments_are_refused() -> None:
    token_slots, ranks, features, sizes = CASES[1]
    step = random_step(token_slots, ranks, features, sizes)
    for name, wrong, message in (
        ("x", step["x"][:, :-1], "a must have shape"),
        ("x", step["x"].double(), "x must be one of"),
        ("loc", step["loc"][:-1], "loc must have shape"),
        ("order", step["order"].long(), "order must be one of"),
        ("h", step["h"][:, :1], "h has room for 1 rows"),
        ("h", step["h"][:1], "h has room for 1 parts"),
        ("h", step["h"][..., :-1].contiguous(), "h must have shape"),
        ("b", step["b"][:, :-1], "b must have shape"),
        ("out", step["out"].T, "out must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            run(Triton, step | {name: wrong}, sizes)
