"""Test what fair queueing holds over several engines, each of which counts by itself."""

from __future__ import annotations

from ..harness import Harness

NUM_ENGINES = 3


def test_a_user_who_floods_all_engines_starves_nobody_at_any_of_them() -> None:
    """While both wait at an engine, they get equal service there; where only one of them has
    requests, that one gets all of it."""
    engines = [Harness(policy="fair", max_num_seqs=2, check=False) for _ in range(NUM_ENGINES)]
    first = 0
    owners: dict[str, str] = {}
    for engine in engines:
        for _ in range(40):
            first += 100
            owners[engine.add(list(range(first, first + 16)), 8, user="flood").request_id] = "flood"
    for _ in range(10):  # all with one prefix, so they meet at one engine
        first += 100
        owners[engines[0].add(list(range(first, first + 16)), 8, user="one").request_id] = "one"
    served = [{"flood": 0, "one": 0} for _ in engines]
    while any(owners[key] == "one" for key in _waiting(engines[0])):
        for engine, counts in zip(engines, served, strict=True):
            for output in engine.step():
                counts[owners[output.request_id]] += len(output.token_ids)
    assert served[0]["one"] > 0 and abs(served[0]["one"] - served[0]["flood"]) <= 3 * 8
    for counts in served[1:]:
        assert counts["one"] == 0 and counts["flood"] > 0


def _waiting(engine: Harness) -> list[str]:
    return [
        one.request.request_id
        for one in engine.scheduler.requests.unfinished()
        if one in engine.scheduler.waiting
    ]
