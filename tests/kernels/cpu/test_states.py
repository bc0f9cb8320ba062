"""Compare the CPU's operations on states with the reference, and rows with themselves in other
company and in other pieces: those must be equal to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quire.engine.devices.cpu.states import CpuStateOps
from quire.engine.states.layers import StepRows
from quire.engine.states.step_states import StepStates
from quire.kernels import reference_states

from ..paged import relative_error
from ..state_steps import (
    HEADS,
    STEPS,
    WIDTHS,
    Recurrence,
    StateStep,
    convolution,
    recurrence,
    state_step,
)

TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
OPS = CpuStateOps()


def rows_of(step: StateStep) -> StepRows:
    nothing = torch.empty(0)
    states = StepStates(nothing, nothing, step.slots, step.saves)
    return StepRows(step.query_start_loc, step.seq_lens, step.num_tokens, states)


def recur(have: Recurrence, step: StateStep, **options: Any) -> torch.Tensor:
    return OPS.recur(*have, rows_of(step), **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", STEPS)
def test_convolve(dtype: torch.dtype, width: tuple[int, int, bool], rows: str) -> None:
    step = state_step(*STEPS[rows])
    channels, taps, has_bias = width
    x, weight, bias, states = convolution(step, channels, taps, dtype, has_bias=has_bias)
    wide, before = bias if bias is None else bias.double(), states.clone()
    found = OPS.convolve(x, OPS.pack_filter(weight, bias), states, rows_of(step))
    expected = reference_states.causal_conv(x.double(), weight.double(), wide, before, *step)
    assert relative_error(found, expected) < TOLERANCES[dtype]
    assert torch.equal(states, before)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rows", STEPS)
@pytest.mark.parametrize("rule", ["delta", "sum"])
def test_recur(dtype: torch.dtype, heads: tuple[int, int, int, int], rows: str, rule: str) -> None:
    step, is_delta = state_step(*STEPS[rows]), rule == "delta"
    have = recurrence(step, heads, dtype, has_beta=is_delta)
    options = {"scale": 0.3 if is_delta else 1.0, "normalise": is_delta}
    wide = [None if tensor is None else tensor.double() for tensor in have]
    found = recur(have, step, **options)
    expected = reference_states.gated_recurrence(*wide, *step, **options)
    assert relative_error(found, expected) < TOLERANCES[dtype]
    assert wide[-1] is not None
    assert relative_error(have.states, wide[-1]) < 2e-6


def test_pieces_of_a_row_give_the_same_bits_in_any_company() -> None:
    """A row of 23 tokens at once, and in pieces of any size beside others."""
    whole = state_step([23], [0])
    gates = recurrence(whole, (2, 4, 33, 40), torch.float32, has_beta=True)
    taps = convolution(whole, 70, 4, torch.float32, has_bias=True)
    packed = OPS.pack_filter(taps.weight, taps.bias)
    options = {"scale": 0.3, "normalise": True}
    saves = torch.full((99,), -1, dtype=torch.int32)
    whole = whole._replace(slots=whole.slots * 0, saves=saves)

    def in_pieces(cuts: list[int], run: Callable[[list[int], StateStep], torch.Tensor]) -> Any:
        outputs, begin = [], 0
        for end in cuts:
            # The piece stands between another sequence's first tokens and one without a slot.
            picks = [*range(5), *range(begin, end), *range(3)]
            loc = torch.tensor([0, 5, 5 + end - begin, 8 + end - begin], dtype=torch.int32)
            slots = torch.tensor([1, 0, -1], dtype=torch.int32)
            lens = torch.tensor([5, end, 3], dtype=torch.int32)
            step = StateStep(slots, saves, loc, lens)
            outputs.append(run(picks, step)[5 : 5 + end - begin])
            begin = end
        return torch.cat(outputs)

    def run_gates(picks: list[int], step: StateStep) -> torch.Tensor:
        tensors = [None if tensor is None else tensor[picks] for tensor in gates[:-1]]
        return recur(Recurrence(*tensors, gates.states), step, **options)  # type: ignore[arg-type]

    def run_taps(picks: list[int], step: StateStep) -> torch.Tensor:
        return OPS.convolve(taps.x[picks], packed, taps.states, rows_of(step))

    both = (
        recur(gates, whole, **options),
        OPS.convolve(taps.x, packed, taps.states, rows_of(whole)),
    )
    ends = gates.states[0].clone(), taps.states[0].clone()
    for cuts in ([23], list(range(1, 24)), [2, 3, 19, 23]):
        assert torch.equal(in_pieces(cuts, run_gates), both[0])
        assert torch.equal(in_pieces(cuts, run_taps), both[1])
        assert torch.equal(gates.states[0], ends[0]) and torch.equal(taps.states[0], ends[1])
