"""Run thousands of seeded requests of every kind through a small pool.

No request is lost, no block leaks, and every token is the one that its request gets by itself.
"""

from __future__ import annotations

import random

import pytest

from quire.engine.request import Request

from ..harness import Harness, expected_tokens

STEM = [random.Random(5).randrange(50, 5000) for _ in range(120)]


def random_prompt(rng: random.Random) -> list[int]:
    """Return a random prompt; half of them start with a prefix of another, of any length."""
    shared = STEM[: rng.randrange(len(STEM))] if rng.random() < 0.5 else []
    return shared + [rng.randrange(50, 60) for _ in range(rng.randrange(1, 30))]


@pytest.mark.parametrize(
    ("num_requests", "run_ahead", "windows", "num_blocks"),
    [
        (10_000, False, (None,), 20),
        (4_000, True, (None,), 20),
        (1_500, False, (None, 30), 34),
        (1_500, True, (None, 30), 42),
    ],
)
def test_thousands_of_requests(
    num_requests: int, run_ahead: bool, windows: tuple[int | None, ...], num_blocks: int
) -> None:
    rng = random.Random(2024)
    harness = Harness(
        num_blocks=num_blocks,
        windows=windows,
        budget=128,
        max_num_seqs=12,
        policy="priority",
        check=False,
        run_ahead=run_ahead,
    )
    requests: dict[str, Request] = {}
    step = 0
    while len(requests) < num_requests or harness.loop.has_work:
        for _ in range(rng.randrange(8)):
            if len(requests) == num_requests or len(harness.scheduler.waiting) > 40:
                break
            request = harness.add(
                random_prompt(rng),
                max_tokens=rng.randrange(1, 25),
                n=rng.choice([1, 1, 1, 1, 2, 4]),
                priority=rng.randrange(3),
                cache_salt=rng.choice([None, None, "salt"]),
                deadline=harness.time + 30 if rng.random() < 0.02 else None,
                stop_token_ids=tuple(rng.sample(range(3, 100), rng.choice([0, 0, 4]))),
                bad_words=rng.choice([(), (), (), ((4, 5),)]),
            )
            requests[request.request_id] = request
        if rng.random() < 0.2 and harness.scheduler.running:
            sequence = rng.choice(harness.scheduler.running)
            choice = rng.choice([None, sequence.choice])
            harness.scheduler.abort_request(sequence.request.request_id, choice)
        harness.time += 1.0
        harness.step()
        step += 1
        if step % 20 == 0:
            harness.check_integrity()
    harness.check_integrity()
    harness.assert_all_free()
    stats = harness.scheduler.stats()
    assert stats.preemptions > num_requests // 100
    assert stats.blocks_copied > num_requests // 10 and stats.prefix_hits > num_requests
    assert (harness.worker.num_fed_back > num_requests) == run_ahead
    reasons = {final.finish_reason for final in harness.finals.values()}
    assert reasons == {"length", "stop", "abort", "error"}
    for request in requests.values():
        for choice in range(request.sampling_params.n):
            final = harness.finals[request.request_id, choice]
            tokens = harness.tokens[request.request_id, choice]
            params = request.sampling_params
            want = expected_tokens(list(request.prompt_token_ids), choice, params.max_tokens)
            stops = [i for i, token in enumerate(want) if token in params.stop_token_ids]
            want = want[: stops[0] + 1] if stops else want
            assert tokens == want[: len(tokens)]
            ended = final.finish_reason == ("stop" if stops else "length")
            assert ended == (len(tokens) == len(want))
