"""How long a step takes, by what it computes.

    seconds = base + token · T + over · max(T − knee, 0) + row · R + context · C + pair · P
              + cold · B

T is the step's tokens, R its rows, C the tokens that its decodes attend to, and P the pairs of
tokens that attend to each other in its chunks of prompts. `base` is the launch and reading the
weights once; beyond `knee` tokens the device is busy with products rather than with memory. B is
how many more tokens the steps just before had: on a CPU, a long chunk displaces what a decode would
have found in the processor's caches.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from ..step import SchedulerOutput

KNEES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Knees among which the fit chooses."""
MIN_POINTS = 8
"""Measurements that a fit needs."""
COOLING = 3
"""With each step after a large one, so much less of what it displaced is still missing."""


class StepShape(NamedTuple):
    """What a step computes; see the module's formula."""

    tokens: int
    rows: int
    context: int
    pairs: int
    before: int = 0

    @classmethod
    def of(cls, plan: SchedulerOutput, last: StepShape | None = None) -> StepShape:
        """Return the shape of a planned step; `last` is that of the step before."""
        context = pairs = 0
        for start, count in zip(plan.num_computed_starts, plan.num_new_tokens, strict=True):
            if count == 1:
                context += start + 1
            else:
                pairs += count * start + count * (count + 1) // 2
        tokens, before = plan.total_tokens, 0
        if last is not None:
            before = max(max(last.tokens, last.before // COOLING) - tokens, 0)
        return cls(tokens, len(plan.seq_ids), context, pairs, before)


class StepTimes(Protocol):
    """A model of step times."""

    def parts(self, shape: StepShape) -> dict[str, float]:
        """Return what the parts of a step take, in seconds; their sum is the step's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTimes:
    """The coefficients of the formula, in seconds; none is negative."""

    base: float
    token: float
    row: float
    context: float
    pair: float
    over: float
    cold: float
    knee: int

    def parts(self, shape: StepShape) -> dict[str, float]:
        return {
            "launch and weights": self.base,
            "tokens": self.token * shape.tokens + self.over * max(shape.tokens - self.knee, 0),
            "rows": self.row * shape.rows,
            "attention": self.context * shape.context + self.pair * shape.pairs,
            "cold caches": self.cold * shape.before,
        }

    def seconds(self, shape: StepShape) -> float:
        """Return the step's time."""
        return sum(self.parts(shape).values())

    def stretched(self, factor: float) -> FittedTimes:
        """Return the times of a device on which every step takes `factor` times as long."""
        return replace(
            self,
            base=self.base * factor,
            token=self.token * factor,
            row=self.row * factor,
            context=self.context * factor,
            pair=self.pair * factor,
            over=self.over * factor,
            cold=self.cold * factor,
        )


class Measured(NamedTuple):
    """A step's shape and the seconds that it took."""

    shape: StepShape
    seconds: float


class Fit(NamedTuple):
    """Fitted times, and by which share of the measured ones they are off: on average, and most."""

    times: FittedTimes
    mean_error: float
    max_error: float


def fit(points: abc.Sequence[Measured]) -> Fit:
    """Fit the formula to measurements, so that relative errors are least.

    Raises ValueError if there are too few.
    """
    if len(points) < MIN_POINTS:
        raise ValueError(f"{len(points)} measured steps are fewer than {MIN_POINTS}")
    largest = max(point.shape.tokens for point in points)
    fits = [_fit_with(points, knee) for knee in KNEES if knee < largest]
    return min(fits, key=lambda one: one.mean_error)


def _fit_with(points: abc.Sequence[Measured], knee: int) -> Fit:
    seconds = np.array([point.seconds for point in points])
    columns = np.array(
        [
            (1, tokens, rows, context, pairs, before, max(tokens - knee, 0) if knee else 0)
            for (tokens, rows, context, pairs, before), _ in points
        ],
        dtype=float,
    )
    solution = least_squares(columns / seconds[:, None], np.ones(len(points)))
    base, token, row, context, pair, cold, over = map(float, solution)
    times = FittedTimes(
        base=base,
        token=token,
        row=row,
        context=context,
        pair=pair,
        over=over,
        cold=cold,
        knee=knee,
    )
    errors = np.abs(columns @ solution / seconds - 1)
    return Fit(times, float(errors.mean()), float(errors.max()))


def least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Solve a small least-squares problem without negative coefficients: leave out the most
    negative one until none is left."""
    scale = np.abs(matrix).max(axis=0)
    active = np.flatnonzero(scale > 0)
    solution = np.zeros(matrix.shape[1])
    while len(active):
        part, *_ = np.linalg.lstsq(matrix[:, active] / scale[active], target, rcond=None)
        if part.min() >= 0:
            solution[active] = part / scale[active]
            break
        active = np.delete(active, part.argmin())
    return solution
