"""The highest rate that keeps within bounds on latency, and what breaks beyond it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ConfigurationError
from .planned_fleet import FleetRun

PRECISION = 0.04
"""Share by which the highest rate may be too low."""
MAX_DOUBLINGS = 12
FRONT_FULL = 0.8
"""Share of the time that HTTP processes are busy if they are what requests wait for; at the
beginning and the end of a run they wait for requests."""


class Bound(NamedTuple):
    """An upper bound: "ttft", "itl" or "e2e", the percentile that must keep it, and seconds."""

    metric: str
    percent: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.metric.upper()} p{self.percent:g} ≤ {self.seconds * 1e3:g} ms"

    @classmethod
    def read(cls, name: str, milliseconds: float) -> Bound:
        """Return the bound of a name such as "ttft-p50". Raises ConfigurationError."""
        metric, _, percent = name.partition("-p")
        try:
            value = float(percent)
        except ValueError:
            value = -1.0
        if metric not in ("ttft", "itl", "e2e") or not 0 < value < 100:
            raise ConfigurationError(f"unknown bound {name!r}: write, for example, ttft-p50")
        return cls(metric, value, milliseconds / 1e3)


def broken(run: FleetRun, bounds: tuple[Bound, ...]) -> list[str]:
    """Return what a run has broken, in words: bounds, and that requests must not pile up."""
    found = [
        f"{bound.metric.upper()} p{bound.percent:g}"
        for bound in bounds
        if run.percentile(bound.metric, bound.percent) > bound.seconds
    ]
    return [*found, "throughput"] if run.piles_up else found


def limit_of(run: FleetRun, max_num_batched_tokens: int) -> str:
    """Return what runs out first in a run that is too much for its engines, in words."""
    if run.preemptions or run.starved_steps > 0.2 * run.num_steps:
        return "KV cache"
    if run.crowded_steps > 0.2 * run.num_steps:
        return "--max-num-seqs"
    if run.full_steps > 0.2 * run.num_steps:
        return "prefill"
    if run.front_busy_share > FRONT_FULL:
        return "HTTP (--http-workers)"
    return "time of a step"


@dataclass(frozen=True, slots=True)
class Capacity:
    """The highest rate within bounds, in requests/s, with its run, and the run of the lowest rate
    that was found to break them. `rate` is 0 if even the lowest rate breaks them."""

    rate: float
    run: FleetRun | None
    beyond: FleetRun | None
    broken: list[str]


def highest_rate(
    run_at: Callable[[float], FleetRun], bounds: tuple[Bound, ...], start: float
) -> Capacity:
    """Search for the highest rate at which a run keeps the bounds and requests do not pile up.

    It doubles or halves `start` until the limit lies between two rates, then bisects.
    """
    low, low_run = 0.0, None
    high, high_run, reasons = float("inf"), None, list[str]()
    rate = start
    for _ in range(2 * MAX_DOUBLINGS):
        run = run_at(rate)
        found = broken(run, bounds)
        if found:
            high, high_run, reasons = rate, run, found
        else:
            low, low_run = rate, run
        if high < float("inf") and low > 0 and high - low <= PRECISION * high:
            break
        if high == float("inf"):
            rate = 2 * low
        elif low == 0.0:
            rate = high / 2
            if rate < start / 2**MAX_DOUBLINGS:
                break
        else:
            rate = (low + high) / 2
    return Capacity(low, low_run, high_run, reasons)
