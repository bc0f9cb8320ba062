"""Test that the times of a server are found from runs that were made of them."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest

from quire.engine.plan.front import Front, FrontTimes
from quire.engine.plan.planned_engine import MessageTimes
from quire.engine.plan.planned_fleet import PlannedFleet, PlannedRequest
from quire.engine.plan.serving import ServedRun, ServingTimes, fit_serving

from .models import TIMES, request, shape

MESSAGES = MessageTimes(step=1e-4, request=2e-4)
HTTP = FrontTimes(request=2e-3, prompt_token=3e-6, latency=1.5e-3, message=2e-4, output=4e-5)
CLIENT = FrontTimes(request=4e-4, prompt_token=1e-6, message=5e-5, output=1e-5)
STRETCH = 1.06


def seconds(times: FrontTimes, requests: list[PlannedRequest], num_steps: int) -> float:
    return (
        len(requests) * times.request
        + sum(len(one.prompt) for one in requests) * times.prompt_token
        + num_steps * times.message
        + sum(one.output_len for one in requests) * times.output
    )


def served(requests: list[PlannedRequest], noise: float = 0.0, seed: int = 0) -> ServedRun:
    """Return what would have been measured of a server with the times above."""
    fleet = PlannedFleet(shape(), TIMES.stretched(STRETCH), 1, Front(HTTP + CLIENT), MESSAGES)
    run = fleet.run(requests)
    rng = random.Random(seed)
    http, client = (
        seconds(times, requests, run.num_steps) * (1 + rng.uniform(-noise, noise))
        for times in (HTTP, CLIENT)
    )
    return ServedRun(requests, run.ttft, run.e2e, run.num_steps, http, client)


def fitted(noise: float = 0.0) -> ServingTimes:
    rng = random.Random(1)

    def many(count: int, gap: float, prompt: int, output: int) -> list[PlannedRequest]:
        now, found = 0.0, []
        for i in range(count):
            found.append(request(now, prompt, output, first=7 * i + prompt))
            now += rng.expovariate(1 / gap) if gap else 0.0
        return found

    alone = served([request(i * 0.2, 60, 8, first=11 * i) for i in range(20)])
    sizes = ((20, 0.2, 60, 8), (60, 0.0, 60, 8), (60, 0.0, 60, 40), (60, 0.0, 60, 2))
    sizes += ((60, 0.0, 400, 2),)
    crowds = [served(many(*size), noise, i) for i, size in enumerate(sizes)]
    loads = [served(many(60, 0.02, 60, 16)) for _ in range(3)]
    return fit_serving(alone, crowds, loads, shape(), TIMES, MESSAGES)


@pytest.fixture(scope="module")
def found() -> ServingTimes:
    return fitted()


def test_the_times_of_a_server_are_found(found: ServingTimes) -> None:
    assert found.error < 1e-6
    assert found.stretch == pytest.approx(STRETCH, abs=0.003)
    for name, value in asdict(replace(HTTP, latency=0.0)).items():
        if name != "latency":
            assert asdict(found.http)[name] == pytest.approx(value, rel=1e-3), name
    assert asdict(found.client) == pytest.approx(asdict(CLIENT))
    assert found.http.latency == pytest.approx(HTTP.latency, abs=5e-5)
    assert found.front(with_client=False) == found.http
    assert found.front(with_client=True).request == pytest.approx(2.4e-3, rel=1e-3)


def test_noise_is_reported_and_no_time_is_negative() -> None:
    noisy = fitted(noise=0.2)
    assert 0.0 < noisy.error < 0.2
    assert min(asdict(noisy.http).values()) >= 0


def test_a_plan_of_what_was_found_is_what_was_measured(found: ServingTimes) -> None:
    rng, now, requests = random.Random(9), 0.0, []
    for i in range(200):
        requests.append(request(now, 60, 16, first=13 * i))
        now += rng.expovariate(60.0)
    measured = served(requests)
    front = Front(found.front(with_client=True))
    times = TIMES.stretched(found.stretch)
    planned = PlannedFleet(shape(), times, 1, front, MESSAGES).run(requests)
    for ours, theirs in ((planned.ttft, measured.ttft), (planned.e2e, measured.e2e)):
        assert sum(ours) == pytest.approx(sum(theirs), rel=0.03)
