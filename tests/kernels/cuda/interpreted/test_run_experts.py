"""Compare mixtures of experts with the reference in float64: 1e-5 (float32), 1e-3 (float16).

Blocks before and after the experts' weights hold NaN, and so do inner and outer values before they
are computed. The interpreter has no bfloat16 matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paged import relative_error

from quire.kernels import reference
from quire.kernels.cuda import sort_by_expert as sorting
from quire.kernels.cuda.run_experts import run_experts
from quire.kernels.cuda.sort_by_expert import most_tiles, sort_by_expert
from quire.kernels.cuda.tuning import ProductConfig, expert_config, expert_configs

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3}
NAN = float("nan")


@pytest.fixture(autouse=True)
def garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fresh memory hold what nobody may read."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(NAN if tensor.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", lambda *args, **kw: fill(empty(*args, **kw)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *args, **kw: fill(new_empty(self, *args, **kw))
    )


def guarded(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return random numbers between two blocks of NaN."""
    count, *rest = shape
    whole = torch.full((count + 2, *rest), NAN, dtype=dtype)
    whole[1:-1] = torch.randn(shape) / rest[-1] ** 0.5
    return whole[1:-1]


def mixture(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    clamp: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Return the arguments of a mixture; rows of x are strided, and one expert gets no token."""
    used = torch.randperm(num_experts)[: max(top_k, num_experts - 1)]
    scores = torch.rand(num_tokens, len(used))
    chosen = used[scores.topk(top_k, dim=1).indices]
    arguments: dict[str, Any] = {
        "input": (3 * torch.randn(num_tokens, hidden_size + 5)).to(dtype)[:, :hidden_size],
        "chosen": chosen,
        "weights": torch.rand(num_tokens, top_k).to(dtype),
        "gate_up": guarded(num_experts, 2 * size, hidden_size, dtype=dtype),
        "down": guarded(num_experts, hidden_size, size, dtype=dtype),
        "clamp": clamp,
    }
    if bias:
        arguments["gate_up_bias"] = guarded(num_experts, 2 * size, dtype=dtype)
        arguments["down_bias"] = guarded(num_experts, hidden_size, dtype=dtype)
    return arguments


def run(function: Callable[..., torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
    named = dict(arguments)
    order = ("input", "chosen", "weights", "gate_up", "down")
    first = [named.pop(name) for name in order]
    return function(*first, **named)


def expected(arguments: dict[str, Any]) -> torch.Tensor:
    def wide(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if is_float else value

    return run(reference.run_experts, {name: wide(value) for name, value in arguments.items()})


SHAPES = [
    (1, 4, 2, 32, 16),
    (7, 6, 3, 64, 40),  # tails of columns and features
    (50, 3, 2, 33, 7),
    (40, 2, 1, 48, 32),  # several tiles of one expert
    (3, 37, 8, 16, 16),  # most experts have no token
]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mixtures(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = mixture(*shape, dtype=dtype)
    found = run(run_experts, arguments)
    assert found.dtype == dtype
    assert relative_error(found, expected(arguments)) < TOLERANCES[dtype]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("clamp", [None, (0.5, 1.7)])
def test_biases_and_the_clamped_gate(clamp: tuple[float, float] | None, bias: bool) -> None:
    arguments = mixture(9, 4, 2, 40, 24, bias=bias, clamp=clamp)
    assert relative_error(run(run_experts, arguments), expected(arguments)) < 1e-5


@pytest.mark.parametrize("config", expert_configs(torch.float16))
def test_every_tile(config: ProductConfig) -> None:
    arguments = mixture(60, 3, 2, 160, 72, dtype=torch.float16)
    found = run(run_experts, arguments | {"config": config})
    assert relative_error(found, expected(arguments)) < TOLERANCES[torch.float16]


def test_which_tile_is_chosen() -> None:
    few, some, many = expert_configs(torch.bfloat16)
    for pairs, config in ((0.1, few), (16, few), (17, some), (64, some), (65, many), (999, many)):
        assert expert_config(pairs, torch.bfloat16) == config
        assert expert_config(pairs, torch.float32) == expert_configs(torch.float32)[0]


def test_the_reference_is_the_formula() -> None:
    arguments = mixture(5, 4, 2, 12, 6, bias=True)
    found = run(reference.run_experts, arguments)
    for token, x in enumerate(arguments["input"]):
        wanted = torch.zeros(12)
        pairs = zip(arguments["chosen"][token], arguments["weights"][token], strict=True)
        for expert, weight in pairs:
            gate, up = (arguments["gate_up"][expert] @ x + arguments["gate_up_bias"][expert]).chunk(
                2
            )
            inner = torch.nn.functional.silu(gate) * up
            wanted += weight * (arguments["down"][expert] @ inner + arguments["down_bias"][expert])
        torch.testing.assert_close(found[token], wanted, atol=1e-5, rtol=1e-5)


def test_a_token_gets_the_same_bits_whatever_its_company() -> None:
    arguments = mixture(45, 5, 3, 40, 24)
    together = run(run_experts, arguments)
    for rows in (slice(0, 1), slice(7, 8), slice(11, 30)):
        some = {name: arguments[name][rows] for name in ("input", "chosen", "weights")}
        assert torch.equal(run(run_experts, arguments | some), together[rows])


@pytest.mark.parametrize("block", [16, sorting.BLOCK])
@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("shape", [(1, 1, 4), (30, 3, 7), (100, 2, 2), (9, 8, 37)])
def test_pairs_are_sorted_in_their_order(
    shape: tuple[int, int, int], block_m: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a program looks at several blocks of pairs."""
    monkeypatch.setattr(sorting, "BLOCK", block)
    num_tokens, top_k, num_experts = shape
    chosen = torch.randint(num_experts, (num_tokens, top_k))
    order, tile_experts = sort_by_expert(chosen, num_experts, block_m)
    assert len(tile_experts) == most_tiles(chosen.numel(), num_experts, block_m)
    tiles = list(zip(tile_experts.tolist(), order.view(-1, block_m).tolist(), strict=True))
    used = [expert for expert, _ in tiles if expert >= 0]
    assert used == sorted(used) and [expert for expert, _ in tiles][len(used) :] == [-1] * (
        len(tiles) - len(used)
    )
    for expert in range(num_experts):
        own = [pair for one, pairs in tiles if one == expert for pair in pairs]
        wanted = (chosen.flatten() == expert).nonzero().flatten().tolist()
        padding = -len(wanted) % block_m
        assert own == wanted + [chosen.numel()] * padding


def test_the_number_of_tiles_suffices_and_is_met() -> None:
    """One pair for each expert, and the rest for one of them, needs the most tiles."""
    for num_pairs, num_experts, block_m in ((1, 4, 16), (37, 4, 16), (64, 128, 16), (500, 3, 64)):
        ones = min(num_pairs, num_experts)
        rest = num_pairs - ones
        worst = ones - 1 + -(-(rest + 1) // block_m)
        assert worst <= most_tiles(num_pairs, num_experts, block_m) <= worst + ones


def test_no_tokens_are_no_launch() -> None:
    arguments = mixture(0, 4, 2, 32, 16)
    assert run(run_experts, arguments).shape == (0, 32)


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("input", lambda x: x.double(), "input must be one of"),
        ("input", lambda x: x.T.contiguous().T, "contiguous last dimension"),
        ("chosen", lambda x: x.int(), "chosen must be one of"),
        ("chosen", lambda x: x[:-1], "chosen must have shape"),
        ("weights", lambda x: x[:, :1], "weights must have shape"),
        ("weights", lambda x: x.T.contiguous().T, "weights must be contiguous"),
        ("gate_up", lambda x: x[:, :-1], "gate_up must have shape"),
        ("gate_up", lambda x: x.half(), "gate_up must be one of"),
        ("down", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "down must be cont"),
        ("down", lambda x: x[:0], "gate_up must have shape"),
        ("down_bias", lambda x: x[:, 1:], "down_bias must have shape"),
        ("clamp", lambda _: (0.0, 1.0), "positive limit"),
    ],
)
def test_wrong_arguments_are_refused(name: str, change: Callable[[Any], Any], message: str) -> None:
    arguments = mixture(6, 4, 2, 32, 16, bias=True)
    with pytest.raises(ValueError, match=message):
        run(run_experts, arguments | {name: change(arguments[name])})
