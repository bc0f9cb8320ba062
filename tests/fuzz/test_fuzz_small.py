"""A little of what `make fuzz` does, so that the fuzzers themselves go on working."""

from __future__ import annotations

import json
import random

import pytest

from .bodies import BASES, encode, mutate
from .files import run_apart
from .http import fuzz


def test_bodies_are_changed_and_stay_json_most_of_the_time() -> None:
    rng = random.Random(1)
    before = json.dumps(BASES)
    sent = [encode(rng, mutate(rng, rng.choice(BASES)[1], ["n", "stop"])) for _ in range(300)]
    assert json.dumps(BASES) == before
    assert len(set(sent)) > 200
    parsed = 0
    for data in sent:
        try:
            json.loads(data)
            parsed += 1
        except ValueError:
            continue
    assert 250 < parsed < 300


@pytest.mark.parametrize(("kind", "cases"), [("grammars", 200), ("templates", 40)])
def test_changed_files_are_read_or_refused_in_time(kind: str, cases: int) -> None:
    result = run_apart(kind, cases, seed=1)
    assert result["wrong"] == []
    assert result["counts"]["accepted"] > 0 and result["counts"]["refused"] > cases / 4


def test_a_real_server_survives_generated_requests_and_random_bytes() -> None:
    fuzzer = fuzz(60, seed=1)
    assert fuzzer.wrong == []
    assert fuzzer.statuses[200] > 5 and fuzzer.statuses[400] > 5
    assert fuzzer.num_bytes > 1000
