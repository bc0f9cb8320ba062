"""Test what steps may take on after some that ran out of device memory."""

from __future__ import annotations

from quire.engine.scheduling.step_budget import CALM, MAX_HOLD, StepBudget


def succeed(budget: StepBudget, steps: int) -> None:
    for _ in range(steps):
        budget.succeeded()


def test_the_budget_halves_and_doubles() -> None:
    budget = StepBudget(64, 8)
    assert budget.tokens == 64 and not budget.holds_admission
    budget.ran_out(60)
    assert budget.tokens == 30 and budget.holds_admission
    succeed(budget, 1)
    assert budget.tokens == 30 and not budget.holds_admission
    succeed(budget, 2)
    assert budget.tokens == 64


def test_a_size_that_fails_is_tried_more_and_more_rarely() -> None:
    budget = StepBudget(64, 8)
    tries, step = [], 0
    for step in range(400):
        if budget.tokens > 32:
            tries.append(step)
            budget.ran_out(budget.tokens)
        else:
            budget.succeeded()
    gaps = [after - before for before, after in zip(tries, tries[1:], strict=False)]
    assert gaps == sorted(gaps) and gaps[-1] >= 128
    assert not budget.holds_admission  # the size was at fault, not the company


def test_requests_that_do_not_fit_together_are_held_longer_each_time() -> None:
    budget = StepBudget(64, 8)
    while not budget.is_smallest:
        budget.ran_out(budget.tokens)
    holds = []
    for _ in range(14):
        budget.ran_out(8)
        hold = 0
        while budget.holds_admission:
            budget.succeeded()
            hold += 1
        while not budget.is_smallest:  # it has grown: what follows fails again
            budget.ran_out(budget.tokens)
        holds.append(hold)
    assert holds[0] == 1 and holds == sorted(holds) and max(holds) == MAX_HOLD


def test_after_calm_and_after_a_culprit_holds_are_short_again() -> None:
    budget = StepBudget(8, 8)
    for _ in range(3):
        budget.ran_out(8)
    succeed(budget, 8 + CALM * (8 + 4 + 2))
    budget.ran_out(8)
    succeed(budget, 1)
    assert not budget.holds_admission
    for _ in range(5):
        budget.ran_out(8)
    budget.found_culprit()
    assert not budget.holds_admission
