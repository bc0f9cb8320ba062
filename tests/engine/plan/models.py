"""Models of step times, and engines, that the planner's tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quire.engine.plan.planned_engine import EngineShape
from quire.engine.plan.planned_fleet import PlannedRequest
from quire.engine.plan.step_times import FittedTimes

SHAPE = EngineShape(
    num_blocks=1000,
    block_size=16,
    max_num_seqs=64,
    max_num_batched_tokens=512,
    max_model_len=4096,
    vocab_size=1000,
    runs_ahead=False,
)
NOTHING = FittedTimes(
    base=0.0, token=0.0, row=0.0, context=0.0, pair=0.0, over=0.0, cold=0.0, knee=0
)
TIMES = FittedTimes(
    base=0.002, token=2e-5, row=1e-5, context=1e-7, pair=1e-8, over=4e-5, cold=0.0, knee=64
)


def shape(**sizes: Any) -> EngineShape:
    return replace(SHAPE, **sizes)


def times(**seconds: float) -> FittedTimes:
    return replace(NOTHING, **seconds)  # type: ignore[arg-type]


def request(
    arrival: float, prompt: int = 20, output: int = 3, first: int = 0, n: int = 1
) -> PlannedRequest:
    """Make a request with a prompt of so many tokens from `first` on."""
    return PlannedRequest(arrival, [(first + i) % 1000 for i in range(prompt)], output, n)
