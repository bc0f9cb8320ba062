"""Compare the recurrence in chunks with the reference in float64: 1e-5 (float32, whose sums of log
decays are rounded), 1e-3 (float16), 2e-2 (bfloat16, in which states enter products)."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from paged import relative_error
from state_steps import Recurrence, StateStep, recurrence, state_step
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from quire.kernels import reference_states
from quire.kernels.cuda.states.chunked_recurrence import MIN_TOKENS, chunked_recurrence

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2e-2}
STEPS: dict[str, tuple[list[int], list[int]]] = {
    "a prompt": ([200], [0]),
    "at the edges of chunks": ([64, 65, 31, MIN_TOKENS, MIN_TOKENS - 1], [0, 3, 64, 0, 9]),
    "beside decodes": ([1, 1, 100, 1, 70, 30, 2], [7, 0, 0, 40, 500, -1, 2]),
}
"""Lengths and starts of rows."""
HEADS = [(1, 2, 64, 64), (2, 2, 128, 40), (1, 3, 20, 12)]
"""Key heads, heads, key dim, value dim."""
CASES = [
    *((torch.float32, HEADS[0], rows) for rows in STEPS),
    (torch.float32, HEADS[1], "beside decodes"),
    (torch.float32, HEADS[2], "at the edges of chunks"),
    (torch.float16, HEADS[2], "beside decodes"),
    (torch.bfloat16, HEADS[0], "at the edges of chunks"),
    (torch.bfloat16, HEADS[1], "beside decodes"),
]


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply bfloat16, of which it multiplies the bits otherwise."""
    multiply = InterpreterBuilder.create_dot

    def widened(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        wide = (operand.data.astype(np.uint32) << 16).view(np.float32)
        return TensorHandle(wide, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return multiply(self, widened(a), widened(b), *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def check(have: Recurrence, step: StateStep, tolerance: float, *, is_delta: bool) -> torch.Tensor:
    """Compare outputs and all states, and return the outputs."""
    options = {"scale": 0.3 if is_delta else 1.0, "normalise": is_delta}
    wide = [None if tensor is None else tensor.double() for tensor in have]
    found = chunked_recurrence(*have, *step, **options)
    expected = reference_states.gated_recurrence(*wide, *step, **options)
    assert relative_error(found, expected) < tolerance
    assert wide[-1] is not None
    assert relative_error(have.states, wide[-1]) < tolerance
    return found


@pytest.mark.parametrize(("dtype", "heads", "rows"), CASES)
@pytest.mark.parametrize("rule", ["delta", "sum"])
def test_steps(dtype: torch.dtype, heads: tuple[int, int, int, int], rows: str, rule: str) -> None:
    step = state_step(*STEPS[rows], saved=0.04)
    assert (step.saves >= 0).sum() > 2
    have = recurrence(step, heads, dtype, has_beta=rule == "delta")
    check(have, step, TOLERANCES[dtype], is_delta=rule == "delta")


@pytest.mark.parametrize("rule", ["delta", "sum"])
def test_every_length(rule: str) -> None:
    """Rows of many lengths, some of whose snapshots share a chunk."""
    lengths = [*range(12, 36, 2), *range(37, 70, 5)]
    step = state_step(lengths, [3 * (i % 2) for i in range(len(lengths))], saved=0.05)
    have = recurrence(step, (1, 1, 16, 8), torch.float32, has_beta=rule == "delta")
    check(have, step, TOLERANCES[torch.float32], is_delta=rule == "delta")


@pytest.mark.parametrize("log_decay", [0.0, -1e-4, -90.0, -3e6, float("-inf")])
def test_states_that_last_and_states_that_vanish(log_decay: float) -> None:
    """Keys that are much alike make the triangular system as hard as it gets; some tokens take in
    nothing, others forget all that came before."""
    step = state_step([100], [5], saved=0.02)
    have = recurrence(step, (1, 2, 16, 8), torch.float32, has_beta=True)
    alike = F.normalize(1 + 0.01 * have.key, dim=-1)
    assert have.beta is not None
    have.log_decay[::7] = log_decay
    have.beta[::3] = 1.0
    have.beta[1::9] = 0.0
    found = check(have._replace(key=alike), step, 2e-5, is_delta=True)
    assert found.isfinite().all()


def test_beta_of_two_in_bfloat16() -> None:
    """A token may turn what its key finds round, as in models with negative eigenvalues."""
    step = state_step([70], [5], saved=0.0)
    have = recurrence(step, (1, 2, 64, 16), torch.bfloat16, has_beta=True)
    assert have.beta is not None
    beta = torch.full_like(have.beta, 2.0)
    lasting = have._replace(beta=beta, log_decay=torch.full_like(beta, -1e-3))
    check(lasting, step, TOLERANCES[torch.bfloat16], is_delta=True)


def test_padding_of_a_captured_step_gets_zeros() -> None:
    """A row of padding without a slot, and rows without tokens, change nothing."""
    step = state_step([1, 40, 20], [9, 0, 2], saved=0.05)
    have = recurrence(step, (1, 2, 16, 8), torch.float32, has_beta=True)
    nothing = torch.full((50,), -1, dtype=torch.int32)
    padded = StateStep(
        torch.cat([step.slots, nothing]),
        torch.cat([step.saves, nothing]),
        F.pad(F.pad(step.query_start_loc, (0, 1), value=101), (0, 2), value=101),
        F.pad(step.seq_lens, (0, 3)),
    )
    longer = [F.pad(tensor, (0, 0, 0, 0, 0, 40), value=1.0) for tensor in have[:3]]
    gates = [F.pad(tensor, (0, 0, 0, 40)) for tensor in have[3:5] if tensor is not None]
    wide = [None if tensor is None else tensor.double() for tensor in have]
    options = {"scale": 0.3, "normalise": True}
    found = chunked_recurrence(*longer, *gates, have.states, *padded, **options)
    expected = reference_states.gated_recurrence(*wide, *step, **options)
    assert relative_error(found[:61], expected) < 1e-5
    assert not found[61:].any()
    assert wide[-1] is not None
    assert relative_error(have.states, wide[-1]) < 1e-5


def test_what_does_not_fit_is_refused() -> None:
    step = state_step([20], [0])
    have = recurrence(step, (2, 4, 8, 12), torch.float32, has_beta=True)
    with pytest.raises(ValueError, match="states must be one of"):
        wide = have._replace(states=have.states.double())
        chunked_recurrence(*wide, *step, scale=1.0, normalise=True)
