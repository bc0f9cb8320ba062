"""Test the policy that chooses the number of engines, as a table, and how loads are measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from quire.engine.config import EngineConfig
from quire.server.ray_app.engine_owner import LoadMeter
from quire.server.ray_app.policy import Load, WaitPolicy, desired_replicas

from ...engine.fakes import FakeCore

IDLE = Load(0, 1000, 0.0, 0.0, 0)
NEW = Load(0, 0, 0.0, 0.0, 0)
BUSY = Load(0, 1000, 0.7, 0.2, 0)
SEATED = Load(0, 1000, 0.2, 0.7, 0)
LATE = Load(5000, 1000, 0.5, 0.5, 0)
PREEMPTING = Load(0, 1000, 0.95, 0.5, 0.2)
CROWDED = Load(10, 1000, 0.5, 1.0, 0)
WELL_USED = Load(0, 1000, 0.95, 0.5, 0)


@pytest.mark.parametrize(
    ("loads", "target", "expected"),
    [
        # Nothing runs yet, or nothing has been measured: nothing changes.
        ([], 3, 3),
        ([NEW], 1, 1),
        ([NEW._replace(waiting_tokens=10**9)], 1, 1),
        # The predicted wait is above the target of 2 s: as many as bring it there.
        ([LATE], 1, 3),
        ([LATE, LATE], 2, 5),
        ([LATE, IDLE, IDLE], 3, 3),
        ([LATE, NEW], 2, 3),
        # They have been asked for and are about to start: no more, and no fewer.
        ([LATE], 4, 4),
        ([LATE], 3, 3),
        # There is no room, and something waits for it or was preempted.
        ([PREEMPTING], 1, 2),
        ([CROWDED, CROWDED], 2, 3),
        ([PREEMPTING, IDLE], 2, 2),
        ([WELL_USED], 1, 1),
        # One less, if the rest stays below 60 % of the target and of the room; never none.
        ([IDLE], 1, 1),
        ([IDLE, IDLE, IDLE], 3, 2),
        ([BUSY, IDLE], 2, 2),
        ([SEATED, IDLE], 2, 2),
        ([BUSY, IDLE, IDLE], 3, 2),
        ([IDLE._replace(waiting_tokens=1100), IDLE], 2, 1),
        ([IDLE._replace(waiting_tokens=1300), IDLE], 2, 2),
        # Not while engines start or leave.
        ([IDLE, IDLE], 3, 3),
        ([IDLE, IDLE, IDLE], 2, 2),
    ],
)
def test_the_number_of_engines(loads: list[Load], target: int, expected: int) -> None:
    assert desired_replicas(loads, target, target_wait=2.0) == expected


def test_serve_calls_it_with_what_the_replicas_report() -> None:
    loads = {"a": LATE._asdict(), "b": IDLE._asdict()}
    metrics = {
        name: {replica: values[name] for replica, values in loads.items()} for name in Load._fields
    }
    context = SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=2)
    assert WaitPolicy(target_wait=1.0)(context) == (5, {})
    assert WaitPolicy(target_wait=10.0)(context) == (1, {})
    context.aggregated_metrics = None
    assert WaitPolicy(target_wait=1.0)(context) == (2, {})


def test_loads_are_measured_while_prompts_wait() -> None:
    now = 10.0
    meter = LoadMeter(lambda: now)
    assert meter.load() is None
    core = FakeCore(EngineConfig(model="fake"))
    meter.engine_ready(core.info)
    stats = core.stats()._replace(num_running=64, num_free_blocks=250, step=0)
    meter.observe_step(stats._replace(waiting_tokens=3000))
    load = meter.load()
    assert load == Load(3000, 0.0, 0.75, 0.25, 0.0)
    # A step computes 1000 tokens of prompts beside 64 decodes, in half a second.
    now += 0.5
    meter.observe_step(stats._replace(step=1, step_tokens=1064, preemptions=3))
    load = meter.load()
    assert load is not None
    assert (load.tokens_per_second, load.preemptions) == (2000, 6)
    # Nothing waited before the next, so it says nothing about prompts.
    now += 5.0
    meter.observe_step(stats._replace(step=2, step_tokens=64, preemptions=3))
    load = meter.load()
    assert load is not None
    assert (load.tokens_per_second, load.waiting_tokens, load.preemptions) == (2000, 0, 0)
