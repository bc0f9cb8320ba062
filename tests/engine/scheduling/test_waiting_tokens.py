"""Test the number of tokens that wait, by which a router weighs an engine's load."""

from __future__ import annotations

import random

import pytest

from quire.engine.config import SchedulingPolicy
from quire.engine.sequence import SequenceStatus

from ..harness import Harness, prompt


def waiting_tokens(harness: Harness) -> int:
    return harness.scheduler.stats().waiting_tokens


def test_tokens_of_prompts_that_wait_and_of_those_that_are_begun() -> None:
    harness = Harness(budget=64, max_num_seqs=2)
    harness.add(prompt(100), 5)
    harness.add(prompt(50, 3000), 5)
    last = harness.add(prompt(30, 5000), 5)
    assert waiting_tokens(harness) == 180
    harness.step()  # 64 of the first
    assert waiting_tokens(harness) == 36 + 80
    harness.step()  # the rest of it, and 28 of the second
    assert waiting_tokens(harness) == 22 + 30
    harness.step()
    assert waiting_tokens(harness) == 30  # there is no seat for the third
    harness.scheduler.abort_request(last.request_id)
    assert waiting_tokens(harness) == 0
    harness.run()


def test_a_prompt_that_ends_in_the_middle_waits_no_more() -> None:
    harness = Harness(budget=64)
    request = harness.add(prompt(500), 5)
    harness.step()
    assert waiting_tokens(harness) == 436
    harness.scheduler.abort_request(request.request_id)
    harness.run()
    assert waiting_tokens(harness) == 0


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_it_is_the_sum_over_those_that_wait(policy: SchedulingPolicy) -> None:
    rng = random.Random(7)
    harness = Harness(num_blocks=11, budget=60, max_num_seqs=6, policy=policy)
    names = []
    for _ in range(300):
        if rng.random() < 0.3:
            length = rng.randrange(1, 90)
            request = harness.add(
                prompt(length, 500 * rng.randrange(9)),
                rng.randrange(1, 30),
                n=rng.randrange(1, 4),
                user=f"u{rng.randrange(3)}",
                priority=rng.randrange(3),
                expected_cached_tokens=rng.randrange(0, 100),
            )
            names.append(request.request_id)
        if names and rng.random() < 0.05:
            harness.scheduler.abort_request(rng.choice(names))
        if harness.loop.has_work:
            harness.step()
        unfinished = list(harness.scheduler.requests.unfinished())
        held = {id(fork) for one in unfinished for fork in one.held_forks}
        expected = sum(
            max(one.num_prompt_tokens - one.request.expected_cached_tokens, 0)
            for one in unfinished
            if one.status is SequenceStatus.WAITING and id(one) not in held
        )
        assert harness.scheduler.waiting.num_tokens == expected
    assert harness.scheduler.stats().preemptions > 0
    harness.run()
    assert waiting_tokens(harness) == 0


def test_what_a_router_expects_decides_nothing() -> None:
    """Neither the tokens nor what a user is charged depend on it."""

    def run(expected: int) -> list[tuple[str, int]]:
        harness = Harness(budget=32, max_num_seqs=1, policy="fair")
        order = []
        for i in range(6):
            user = "ab"[i % 2]
            length = 60 if user == "a" else 20
            cached = expected if user == "a" else 0
            harness.add(
                prompt(length, 300 * i),
                3,
                user=user,
                request_id=f"{user}{i}",
                expected_cached_tokens=cached,
            )
        while harness.loop.has_work:
            order += [(one.request_id, len(one.token_ids)) for one in harness.step()]
        return order

    assert run(0) == run(59)
