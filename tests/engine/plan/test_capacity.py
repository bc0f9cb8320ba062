"""Test the search for the highest rate, and what is said of the limit."""

from __future__ import annotations

import pytest

from quire.engine.errors import ConfigurationError
from quire.engine.plan.capacity import Bound, broken, highest_rate, limit_of
from quire.engine.plan.planned_fleet import FleetRun, PlannedFleet

from .models import request, shape, times

BOUNDS = (Bound.read("ttft-p50", 100.0), Bound.read("itl-p99", 50.0))


def make_run(ttft: float = 0.01, itl: float = 0.01, **fields: object) -> FleetRun:
    values: dict[str, object] = dict.fromkeys(FleetRun.__slots__, 0)
    values |= {"ttft": [ttft], "itl": [itl], "e2e": [1.0], "duration": 1.0, "num_steps": 100}
    values |= {"open_at_arrival": [], "busy_by_part": {}}
    return FleetRun(**{**values, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [0.5, 1.0, 40.0, 300.0])
@pytest.mark.parametrize("limit", [0.31, 7.0, 39.0, 900.0])
def test_the_highest_rate_is_found_from_any_start(start: float, limit: float) -> None:
    calls = []

    def run_at(rate: float) -> FleetRun:
        calls.append(rate)
        return make_run(ttft=0.01 if rate <= limit else 0.2)

    found = highest_rate(run_at, BOUNDS, start)
    assert 0.95 * limit <= found.rate <= limit and len(calls) <= 24
    assert found.broken == ["TTFT p50"] and found.run is not None and found.beyond is not None


def test_bounds_that_nothing_keeps() -> None:
    found = highest_rate(lambda rate: make_run(itl=0.2), BOUNDS, 8.0)
    assert found.rate == 0 and found.run is None and found.broken == ["ITL p99"]


def test_what_is_broken_and_what_runs_out() -> None:
    assert broken(make_run(), BOUNDS) == []
    assert broken(make_run(0.2, 0.2), BOUNDS) == ["TTFT p50", "ITL p99"]
    assert broken(make_run(open_at_arrival=list(range(40))), ()) == ["throughput"]
    assert limit_of(make_run(preemptions=3, crowded_steps=90), 512) == "KV cache"
    assert limit_of(make_run(starved_steps=30), 512) == "KV cache"
    assert limit_of(make_run(crowded_steps=90, full_steps=90), 512) == "--max-num-seqs"
    assert limit_of(make_run(full_steps=90), 512) == "prefill"
    assert limit_of(make_run(), 512) == "time of a step"
    assert limit_of(make_run(front_busy_share=0.99), 512) == "HTTP (--http-workers)"


def test_the_capacity_of_a_planned_engine_is_its_service_rate() -> None:
    """Of one request at a time, each for 10 ms, 100 a second can be served."""

    def run_at(rate: float) -> FleetRun:
        requests = [request(i / rate, 8, 1, first=31 * i) for i in range(300)]
        return PlannedFleet(shape(max_num_seqs=1), times(base=0.01), 1).run(requests)

    assert highest_rate(run_at, (), 1.0).rate == pytest.approx(100, rel=0.06)


@pytest.mark.parametrize("name", ["ttft", "ttft-50", "itl-p", "itl-p0", "itl-p100", "tpot-p50"])
def test_unknown_bounds_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="unknown bound"):
        Bound.read(name, 1.0)
