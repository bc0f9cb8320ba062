"""Test that the fit finds the times that measurements were made of."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest

from quire.engine.plan.step_times import FittedTimes, Measured, StepShape, fit
from quire.engine.step import SchedulerOutput

from .models import TIMES, times


def points(model: FittedTimes, noise: float = 0.0) -> list[Measured]:
    rng = random.Random(1)
    shapes = [
        StepShape(rows, rows, rows * context, 0, before)
        for rows in (1, 4, 16, 64, 256)
        for context, before in ((16, 0), (512, 0), (512, 300), (2048, 20))
    ]
    shapes += [
        StepShape(length, 1, 0, length * start + length * (length + 1) // 2)
        for length in (16, 64, 128, 512)
        for start in (0, 512)
    ]
    return [Measured(one, model.seconds(one) * (1 + rng.uniform(-noise, noise))) for one in shapes]


@pytest.mark.parametrize(
    "model",
    [TIMES, times(base=0.01), times(token=1e-4, pair=1e-8), times(base=1e-3, row=2e-4, cold=1e-5)],
)
def test_the_fit_is_exact_if_the_formula_is(model: FittedTimes) -> None:
    found = fit(points(model))
    assert found.max_error < 1e-6
    for name, seconds in asdict(model).items():
        if name != "knee" and not (name in ("row", "token") and model.knee == 0):
            assert asdict(found.times)[name] == pytest.approx(seconds, abs=1e-9), name
    unseen = StepShape(100, 30, 40_000, 5_000)
    assert found.times.seconds(unseen) == pytest.approx(model.seconds(unseen))


def test_noise_is_reported_and_no_time_is_negative() -> None:
    found = fit(points(TIMES, noise=0.2))
    assert 0.03 < found.mean_error < 0.2 and found.max_error < 0.5
    assert min(asdict(found.times).values()) >= 0


def test_too_few_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="7 measured steps are fewer than 8"):
        fit(points(TIMES)[:7])


def test_the_shape_of_a_step() -> None:
    plan = SchedulerOutput(1, [1, 2, 3], [99, 0, 32], [1, 4, 3], [0] * 8, [], [], [], [], [], {})
    first = StepShape.of(plan)
    assert first == (8, 3, 100, 10 + (3 * 32 + 6), 0)
    assert StepShape.of(plan, first).before == 0
    second = StepShape.of(plan, StepShape(98, 1, 0, 0))
    assert second.before == 90
    assert StepShape.of(plan, second).before == 22
    assert TIMES.seconds(StepShape(0, 0, 0, 0)) == TIMES.base
