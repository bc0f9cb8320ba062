"""Test the router on the messages of real engines without a model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.events.block_events import block_key
from quire.engine.fleet.fleet_router import FleetRouter
from quire.engine.fleet.router import Choice
from quire.engine.outputs import EngineStats
from quire.engine.process import wire
from quire.engine.request import Request

from ..fakes import FakeCore
from ..harness import make_request, prompt
from .local_engine import Link, local_engine

INFO = FakeCore(EngineConfig(model="fake")).info
STATS = EngineStats(0, 0, 0, 100, 100, 0, 0, 0, 0, 0, 0, 0)


class Fleet:
    """Links to engines, and the router that follows them."""

    def __init__(self, links: dict[str, Link]) -> None:
        self.links = links
        self.router = FleetRouter()
        for engine, link in links.items():
            assert isinstance(link.ready, wire.Ready)
            link.send(self.router.join(engine, link.ready.info))
            self.router.observe(engine, link.receive_until(wire.BlocksKnown))

    def serve(self, request: Request, engine: str | None = None) -> tuple[Choice, int]:
        """Route a request and wait for its end; return the choice and the cached tokens."""
        router = self.router
        hashes = router.hashes(request)
        choice = router.choose(request, hashes, 0.0, engine and [engine])
        router.sent(request, hashes, choice, 0.0)
        link = self.links[choice.engine]
        link.send(wire.Add(replace(request, expected_cached_tokens=choice.predicted_cached_tokens)))
        while True:
            message = link.receive()
            answer = router.observe(choice.engine, message)
            if answer is not None:
                link.send(answer)
            if isinstance(message, wire.StepMessage):
                for output in message.outputs:
                    if output.finish_reason and output.request_id == request.request_id:
                        assert output.num_cached_tokens is not None
                        router.compare(choice, output.num_cached_tokens)
                        return choice, output.num_cached_tokens


def test_requests_follow_their_prefix_and_predictions_come_true(tmp_path: Path) -> None:
    with ExitStack() as stack:
        links = {
            name: stack.enter_context(local_engine(tmp_path, num_blocks=40))() for name in "abc"
        }
        fleet = Fleet(links)
        first, cached = fleet.serve(make_request(prompt(160), 2))
        assert (first.predicted_cached_tokens, cached) == (0, 0)
        for length in (200, 176, 161, 300):
            choice, cached = fleet.serve(make_request(prompt(length), 2))
            assert choice.engine == first.engine
            assert cached - choice.predicted_cached_tokens in range(16)
            assert choice.predicted_cached_tokens >= 144
        # Prompts of others evict it. The router hears of that.
        for i in range(4):
            fleet.serve(make_request(prompt(300, first=2000 + 500 * i), 2), first.engine)
        choice, cached = fleet.serve(make_request(prompt(200), 2), first.engine)
        assert choice.predicted_cached_tokens == cached == 0
        router = fleet.router
        assert abs(router.actual_tokens - router.predicted_tokens) <= router.wrong_tokens < 16 * 10


def test_a_gap_is_closed_by_asking_again(tmp_path: Path) -> None:
    with local_engine(tmp_path) as connect:
        fleet = Fleet({"a": connect()})
        link, router = fleet.links["a"], fleet.router
        fleet.serve(make_request(prompt(80), 2))
        link.send(wire.Add(make_request(prompt(80, first=900), 2)))  # its changes are lost
        while not link.receive_until(wire.StepMessage).outputs[0].finish_reason:
            pass
        link.send(wire.Add(make_request(prompt(80, first=1800), 2)))
        answer = None
        while answer is None:
            answer = router.observe("a", link.receive_until(wire.StepMessage))
        assert answer == wire.WatchBlocks()
        link.send(answer)
        router.observe("a", link.receive_until(wire.BlocksKnown))
        for first in (900, 1800, 5000):
            choice, cached = fleet.serve(make_request(prompt(90, first), 2))
            assert choice.predicted_cached_tokens == cached == (80 if first != 5000 else 0)


def test_what_was_sent_counts_until_the_engine_has_read_it() -> None:
    router = FleetRouter()
    for engine in "ab":
        router.join(engine, INFO)
        router.observe(engine, wire.BlocksKnown(0, b""))
    chosen = []
    for i in range(6):
        request = make_request(prompt(100, first=1000 * i), 2, n=2)
        choice = router.choose(request, [], 0.0)
        router.sent(request, [], choice, 0.0)
        chosen.append(choice.engine)
    assert sorted(chosen) == list("aaabbb")
    # Engine a has read all and is done with them; of b nothing is heard.
    router.observe("a", wire.Heartbeat(STATS, 0, num_added=3))
    assert router.choose(request, [], 0.0).engine == "a"
    # It has read two of four, which wait.
    router.sent(request, [], Choice("a", 0), 0.0)
    router.observe("a", wire.StepMessage([], STATS._replace(waiting_tokens=150), num_added=3))
    router.observe("b", wire.StepMessage([], STATS._replace(waiting_tokens=90), num_added=3))
    assert router.choose(request, [], 0.0).engine == "b"


def test_requests_for_an_adapter_stay_together() -> None:
    router = FleetRouter()
    for engine in "abcd":
        router.join(engine, INFO)
    requests = [make_request(prompt(50, i), 2, adapter="sql") for i in range(5)]
    assert all(router.hashes(one) == [] for one in requests)  # of an unknown version
    assert len({router.choose(one, [], 0.0).engine for one in requests}) == 1
    others = {router.choose(make_request([1], adapter=f"x{i}"), [], 0.0).engine for i in range(40)}
    assert len(others) == 4


def test_a_prompt_for_an_adapter_follows_the_blocks_of_its_version() -> None:
    router = FleetRouter()
    for engine in "ab":
        router.join(engine, INFO)
        router.observe(engine, wire.BlocksKnown(0, b""))
    request = make_request(prompt(160), 2, adapter="sql")
    keys = [block_key(one) for one in router.hashes(request, "v1")]
    for engine in "ab":
        router.observe(engine, wire.BlocksKnown(1, b"".join(keys) if engine == "b" else b""))
    for version, plain, cached in (("v1", False, 159), ("v2", False, 0), ("v1", True, 0)):
        one = make_request(prompt(160), 2, adapter=None if plain else "sql")
        choice = router.choose(one, router.hashes(one, version), 0.0, "b")
        assert choice.predicted_cached_tokens == cached
    assert router.choose(request, router.hashes(request, "v1"), 0.0).engine == "b"


def test_an_engine_that_has_the_adapter_in_a_slot_is_preferred() -> None:
    router = FleetRouter()
    for engine in "ab":
        router.join(engine, INFO)
    request = make_request(prompt(100), 2, adapter="sql")
    for has, lacks in ("ab", "ba"):
        router.observe(has, wire.Heartbeat(STATS._replace(held_adapters=["sql"]), 0, num_added=0))
        router.observe(lacks, wire.Heartbeat(STATS, 0, num_added=0))
        assert router.choose(request, [], 0.0).engine == has
        # Not at any price.
        busy = STATS._replace(held_adapters=["sql"], waiting_tokens=100)
        router.observe(has, wire.Heartbeat(busy, 0, num_added=0))
        assert router.choose(request, [], 0.0).engine == lacks
    # What has been sent fills a slot, too.
    for engine in "ab":
        router.observe(engine, wire.Heartbeat(STATS, 0, num_added=0))
    router.sent(make_request([5], 1, adapter="sql"), [], Choice("a", 0), 0.0)
    assert router.choose(request, [], 0.0).engine == "a"


def test_engines_that_left_are_not_chosen() -> None:
    router = FleetRouter()
    for engine in "ab":
        router.join(engine, INFO)
    router.leave("a")
    assert {router.choose(make_request(prompt(20, i)), [], 0.0).engine for i in range(9)} == {"b"}
    with pytest.raises(ValueError, match="min"):
        router.choose(make_request(prompt(20)), [], 0.0, [])
