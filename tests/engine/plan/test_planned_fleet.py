"""Test virtual time against cases that can be computed by hand, and the router in the plan."""

from __future__ import annotations

import random

import pytest

from quire.engine.errors import ConfigurationError
from quire.engine.plan.front import Front, FrontTimes
from quire.engine.plan.planned_engine import MessageTimes
from quire.engine.plan.planned_fleet import FleetRun, PlannedFleet, PlannedRequest

from .models import TIMES, request, shape, times


def run(
    requests: list[PlannedRequest],
    replicas: int = 1,
    front: FrontTimes | None = None,
    workers: int = 1,
    messages: MessageTimes | None = None,
    model: object = None,
    **sizes: object,
) -> FleetRun:
    fleet = PlannedFleet(
        shape(**sizes),
        model or times(base=0.01),  # type: ignore[arg-type]
        replicas,
        Front(front or FrontTimes(), workers),
        messages,
    )
    return fleet.run(requests)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_request_alone(runs_ahead: bool) -> None:
    """Steps take 10 ms: one for the prompt and its first token, one for each of the others."""
    front = FrontTimes(request=0.0005, prompt_token=0.00005, latency=0.0005)
    result = run([request(5.0, output=4)], runs_ahead=runs_ahead, front=front)
    assert result.ttft == pytest.approx([0.012])
    assert result.itl == pytest.approx([0.01] * 3)
    assert result.e2e == pytest.approx([0.042]) and result.duration == pytest.approx(0.042)
    assert (result.output_tokens, result.prompt_tokens) == (4, 20)
    assert result.requests_per_s == pytest.approx(1 / 0.042)


def test_outputs_pass_the_front_one_after_the_other_the_newest_last() -> None:
    """Each takes 1 ms: the first token of the fourth request waits for three others' tokens."""
    requests = [request(0.0, output=9, first=100 * i) for i in range(3)]
    late = request(0.015, output=1, first=900)
    result = run([*requests, late], front=FrontTimes(latency=0.002, output=0.001))
    # It comes at 0.017, in the step from 0.022 to 0.032, behind three.
    assert result.ttft == pytest.approx([0.013, 0.014, 0.015, 0.021])
    assert result.itl == pytest.approx([0.01] * 24)
    assert result.queue == pytest.approx([0.005, 0.0, 0.0, 0.0])
    assert result.prefill == pytest.approx([0.01] * 4)
    assert result.duration == pytest.approx(0.002 + 0.09 + 0.003)
    assert result.front_busy_share == pytest.approx(0.028 / result.duration)


def test_prompts_and_outputs_wait_for_each_other() -> None:
    """A request takes 4 ms of an HTTP process, a step's message 1 ms and an output 2 ms."""
    front = FrontTimes(request=0.004, message=0.001, output=0.002)
    requests = [request(0.0, output=3), request(0.0, output=1, first=300)]
    result = run(requests, front=front)
    # The engine gets them at 4 and 8 ms. The first one's step ends at 14 ms, its output is there at
    # 17 ms; the second one's at 24 ms, where it comes after that of the first one.
    assert result.ttft == pytest.approx([0.017, 0.029])
    assert result.queue == pytest.approx([0.006, 0.0])
    assert result.itl == pytest.approx([0.01, 0.01])
    # One that arrives while the first output is written is read after that, until 21 ms, and misses
    # the step that began at 14 ms. In the next one it comes after the first one's third token.
    third = request(0.0145, output=1, first=600)
    result = run([requests[0], third], front=front)
    assert result.ttft == pytest.approx([0.017, 0.034 + 0.005 - 0.0145])
    # One that is being read when a step ends makes its outputs wait.
    result = run([requests[0], third._replace(arrival=0.013)], front=front)
    assert result.ttft[0] == pytest.approx(0.013 + 0.004 + 0.003)


def test_several_http_processes_share_the_requests() -> None:
    front = FrontTimes(request=0.005, output=0.001)
    requests = [request(0.0, output=1, first=100 * i) for i in range(4)]
    one, two = (run(requests, front=front, workers=workers) for workers in (1, 2))
    # One process reads until 20 ms, so the first output, made at 15 ms, waits.
    assert one.ttft == pytest.approx([0.021, 0.026, 0.027, 0.036])
    assert two.ttft == pytest.approx([0.016, 0.016, 0.026, 0.026])
    assert one.front_busy_share == pytest.approx(0.024 / 0.036)
    assert two.front_busy_share == pytest.approx(0.012 / 0.026)


def test_the_waits_for_an_http_process_are_those_of_theory() -> None:
    """The engine takes no time, so it is an M/D/1 queue again. But an output is a second job: it
    waits for the requests that came while its own was in the queue, ρ of that time by Little."""
    rng = random.Random(6)
    now, requests = 0.0, []
    for i in range(4000):
        now += rng.expovariate(0.6 / 0.01)
        requests.append(request(now, prompt=8, output=1, first=(37 * i) % 1000))
    result = run(requests, model=times(), front=FrontTimes(request=0.01))
    mean = sum(result.ttft) / len(result.ttft)
    assert mean == pytest.approx(0.01 * (1 + 0.6 / (2 * 0.4)) * (1 + 0.6), rel=0.08)
    assert result.front_busy_share == pytest.approx(0.6, rel=0.04)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_messages_take_time_between_steps(runs_ahead: bool) -> None:
    """They take 1 ms for each step and 2 ms for each request, which a device does not wait for if
    it has another step to do."""
    messages = MessageTimes(step=0.001, request=0.002)
    requests = [request(0.0, output=4), request(0.0, output=4, first=300)]
    result = run(requests, messages=messages, runs_ahead=runs_ahead)
    assert result.ttft == pytest.approx([0.015] * 2)
    if runs_ahead:
        assert result.itl == pytest.approx([0.01] * 6)
        assert "messages" not in result.busy_by_part
    else:
        assert result.itl == pytest.approx([0.011] * 6)
        assert result.busy_by_part["messages"] == pytest.approx(0.008 / 0.048)


def test_a_request_waits_for_the_step_that_runs() -> None:
    result = run([request(0.0, output=3), request(0.004, output=1, first=500)])
    assert result.ttft == pytest.approx([0.01, 0.016])  # the second begins at 0.01
    assert result.open_at_arrival == [0, 1]


def test_a_long_prompt_takes_chunks_and_choices_share_it() -> None:
    result = run([request(0.0, prompt=1200, output=2)], max_num_batched_tokens=512)
    assert result.ttft == pytest.approx([0.03]) and result.e2e == pytest.approx([0.04])
    result = run([request(0.0, prompt=100, output=3, n=4)])
    assert result.output_tokens == 12 and len(result.ttft) == len(result.e2e) == 1
    assert len(result.itl) == 8


def test_time_by_what_a_step_computes() -> None:
    model = times(token=1e-4, context=1e-6)
    result = run([request(0.0, prompt=100, output=2)], model=model)
    assert result.ttft == pytest.approx([0.01])
    assert result.itl == pytest.approx([1e-4 + 101e-6])
    assert result.busy_share == pytest.approx(1.0)
    assert sum(result.busy_by_part.values()) == pytest.approx(1.0)
    assert result.busy_by_part["attention"] == pytest.approx(101e-6 / result.duration)


def test_the_waits_of_a_queue_with_equal_service_are_those_of_theory() -> None:
    """With one request at a time this is an M/D/1 queue: the mean wait is ρ S / 2(1 − ρ)."""
    rng = random.Random(5)
    for load in (0.3, 0.7):
        now, requests = 0.0, []
        for i in range(4000):
            now += rng.expovariate(load / 0.01)
            requests.append(request(now, prompt=8, output=1, first=(37 * i) % 1000))
        result = run(requests, max_num_seqs=1)
        mean = sum(result.ttft) / len(result.ttft)
        assert mean == pytest.approx(0.01 * (1 + load / (2 * (1 - load))), rel=0.08)
        assert result.busy_share == pytest.approx(load, rel=0.04)


def test_a_plan_is_the_same_every_time() -> None:
    requests = [request(0.003 * i, 40, 12, first=61 * i) for i in range(80)]
    first, second = (run(requests, 3, model=TIMES) for _ in range(2))
    assert first == second


def test_two_engines_share_the_load_and_prefixes_stay_together() -> None:
    rng = random.Random(2)
    requests = []
    for i in range(120):
        prefix = [[7, 400][rng.randrange(2)]] * 320
        prompt = [*prefix, *(rng.randrange(1000) for _ in range(30))]
        requests.append(PlannedRequest(0.02 * i, prompt, 4))
    model = times(token=1e-4)
    result = run(requests, 2, model=model)
    # Each prefix is computed once for each engine at most, but for requests side by side.
    assert result.cached_tokens > 0.9 * 320 * (120 - 4)
    assert result.wrongly_predicted_tokens < 16 * 120
    alone = run(requests, 1, model=model)
    assert result.percentile("ttft", 99) <= alone.percentile("ttft", 99)


def test_a_small_cache_preempts_and_the_answers_still_end() -> None:
    requests = [request(0.0, 60, 60, first=100 * i) for i in range(8)]
    result = run(requests, num_blocks=20, max_model_len=200)
    assert result.preemptions > 0 and len(result.e2e) == 8 and result.peak_kv_usage > 0.95


def test_requests_that_pile_up_are_noticed() -> None:
    def offered(gap: float) -> FleetRun:
        return run([request(gap * i, 8, 1, first=31 * i) for i in range(200)], max_num_seqs=1)

    assert not offered(0.012).piles_up and offered(0.007).piles_up


def test_a_request_that_can_never_run_is_named() -> None:
    with pytest.raises(ConfigurationError, match="request 1 of the workload: .*maximum context"):
        run([request(0.0), request(0.0, prompt=5000)])
