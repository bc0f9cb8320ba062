"""Test which projections are merged, which are left alone, and that the results are the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from quire.engine.body.merged_linear import LinearColumn, MergedLinear, merge_siblings

from ..models import FAMILIES, save_model
from ..worker_driver import load

SIZE = 8


class Projections(nn.Module):
    """Four linear layers that `call` applies to the input."""

    def __init__(self, call: Callable[[Projections, torch.Tensor], list[torch.Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call = call
        self.a, self.b, self.c = (nn.Linear(SIZE, size) for size in (4, 6, 2))
        self.unbiased = nn.Linear(SIZE, 4, bias=False)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.call(self, x)


def changed_between(m: Projections, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone()
    first = m.a(x)
    return [first, m.b(x.mul_(2)), m.c(x)]


def viewed_across_rows(m: Projections, x: torch.Tensor) -> list[torch.Tensor]:
    return [m.a(x).view(-1), m.b(x).view(-1)]


CALLS: dict[str, tuple[Callable[[Projections, torch.Tensor], list[torch.Tensor]], list[str]]] = {
    "one input": (lambda m, x: [m.a(x), m.b(x), m.c(x)], ["a b c"]),
    "in between": (lambda m, x: [m.a(x), m.c(x + 1), m.b(x)], ["a b"]),
    "equal but not the same": (lambda m, x: [m.a(x), m.b(x.clone())], []),
    "called twice": (lambda m, x: [m.a(x), m.a(x), m.b(x), m.c(x)], ["b c"]),
    "biased and not": (lambda m, x: [m.a(x), m.unbiased(x)], []),
    "input changed in place": (changed_between, ["b c"]),
    "no columns": (viewed_across_rows, []),
    "input by name": (lambda m, x: [m.a(input=x), m.b(x), m.c(x)], ["b c"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_only_layers_with_the_same_input_are_merged(name: str) -> None:
    call, merged = CALLS[name]
    module, expected = Projections(call), Projections(call)
    probe = torch.randn(3, SIZE)
    assert merge_siblings(module, lambda: module(probe)) == [tuple(m.split()) for m in merged]
    assert isinstance(module.b, LinearColumn if "b" in "".join(merged) else nn.Linear)
    for _ in range(2):
        x = torch.randn(5, SIZE)
        for got, want in zip(module(x), expected(x), strict=True):
            torch.testing.assert_close(got, want)
    for got, want in zip(module.children(), expected.children(), strict=True):
        torch.testing.assert_close(got.weight, want.weight)
        torch.testing.assert_close(got.bias, want.bias)


def test_a_column_called_out_of_order_is_still_correct() -> None:
    module = Projections(lambda m, x: [m.a(x), m.b(x)])
    probe = torch.randn(3, SIZE)
    plain = Projections(module.call)
    merge_siblings(module, lambda: module(probe))
    first, second = torch.randn(2, 3, SIZE)
    asked = [
        (m.a(first), m.a(second), m.a(second), m.b(first), m.b(second)) for m in (module, plain)
    ]
    for got, want in zip(*asked, strict=True):
        torch.testing.assert_close(got, want)


def test_no_tensor_is_kept_between_steps() -> None:
    module = Projections(lambda m, x: [m.a(x), m.b(x), m.c(x)])
    merge_siblings(module, lambda: module(torch.randn(3, SIZE)))
    merged = next(m for m in module.modules() if isinstance(m, MergedLinear))
    module(torch.randn(3, SIZE))
    assert merged._input is None and merged._outputs == ()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_merges_the_expected_projections(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(family, tmp_path)
    with caplog.at_level(logging.INFO, logger="quire.engine"):
        model = load(tmp_path)
    layers = model.spec.num_layers
    attention = f"merged q_proj, k_proj, v_proj ({layers} times)"
    mlp = f"merged gate_proj, up_proj ({layers} times)"
    expected = dict.fromkeys(("glm4", "gpt_oss", "mixtral", "olmoe", "qwen3_moe"), [attention])
    expected["phi3"] = []
    found = [message for message in caplog.messages if "merged" in message]
    assert found == expected.get(family, [attention, mlp])
