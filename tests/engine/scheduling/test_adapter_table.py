"""Test how sequences with LoRA adapters share the slots, with hashes as the model."""

from __future__ import annotations

import random

import pytest

from quire.engine.errors import InvalidRequestError, ModelNotFoundError
from quire.engine.lora import AdapterSource
from quire.engine.scheduling import adapter_table
from quire.engine.scheduling.adapter_table import MAX_PASSES, AdapterTable
from quire.engine.step import SchedulerOutput

from ..harness import Harness, expected_tokens, prompt


class AdapterHarness(Harness):
    """A harness whose worker checks that each row's adapter is in its slot."""

    def __init__(self, names: str, num_slots: int, **fields: object) -> None:
        self.table = AdapterTable(num_slots, 100)
        super().__init__(adapters=self.table, **fields)  # type: ignore[arg-type]
        for name in names:
            self.load(name)
        self.slots: dict[int, int] = {}
        self.running: list[set[str]] = []
        self.num_loads = 0
        forward = self.worker.forward

        def watch(output: SchedulerOutput) -> object:
            self.slots.update(dict(output.adapter_loads))
            self.num_loads += len(output.adapter_loads)
            executed = forward(output)
            sequences = {one.seq_id: one for one in self.scheduler.running}
            for seq_id in output.seq_ids:
                sequence, spec = sequences[seq_id], self.worker.known[seq_id].spec
                held = self.slots[spec.adapter_slot] if spec.adapter_slot >= 0 else None
                assert held == sequence.adapter_id
            self.running.append(
                {sequences[one].request.adapter or "" for one in output.seq_ids} - {""}
            )
            return executed

        self.worker.forward = watch  # type: ignore[method-assign, assignment]

    def load(self, name: str) -> int:
        return self.table.add(AdapterSource(name, f"/adapters/{name}"))

    def check_integrity(self) -> None:
        super().check_integrity()
        self.table.check_integrity(self.scheduler.running)


def test_no_more_adapters_run_than_there_are_slots() -> None:
    harness = AdapterHarness("abcd", 2)
    requests = [harness.add(prompt(20, 50 * i), 5, adapter="abcd"[i % 4]) for i in range(8)]
    plain = harness.add(prompt(20), 5)
    harness.step()
    # Two adapters run, the requests of the other two wait, and one without an adapter passes them.
    assert harness.running[0] == {"a", "b"} and len(harness.scheduler.running) == 5
    stats = harness.scheduler.stats()
    assert stats.running_adapters == ["a", "b"] and stats.waiting_adapters == ["c", "d"]
    harness.run()
    assert max(map(len, harness.running)) == 2
    assert harness.num_loads == 4
    for request in [*requests, plain]:
        expected = expected_tokens(list(request.prompt_token_ids), 0, 5)
        assert harness.tokens[request.request_id, 0] == expected
    harness.assert_all_free()
    stats = harness.scheduler.stats()
    assert stats.running_adapters == stats.waiting_adapters == []


def test_an_adapter_that_comes_back_is_still_in_its_slot() -> None:
    harness = AdapterHarness("abc", 2)
    for name in "abababcb":
        harness.add(prompt(5), 2, adapter=name)
        harness.run()
    # a and b once; c takes the place of a, which was idle for longer.
    assert harness.num_loads == 3


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_nobody_waits_for_ever_for_a_slot(policy: str) -> None:
    """Requests for the adapter that runs arrive without end; two others wait."""
    harness = AdapterHarness("abc", 1, max_num_seqs=4, policy=policy, num_blocks=256)
    for index in range(4):
        harness.add(prompt(5, 100 * index), 3 + index, adapter="a", user=f"user {index}")
    harness.step()
    waiting = [harness.add(prompt(5), 3, adapter=name, user=f"waits for {name}") for name in "bc"]
    for steps in range(40 * MAX_PASSES):
        harness.add(prompt(5, 7 * steps), 3, adapter="a", user=f"user {steps % 5}")
        harness.step()
        if all((request.request_id, 0) in harness.finals for request in waiting):
            break
    assert all((request.request_id, 0) in harness.finals for request in waiting)


def test_only_some_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_table, "MAX_PASSES", 3)
    harness = AdapterHarness("ab", 1, max_num_seqs=8)
    harness.add(prompt(5), 30, adapter="a")
    harness.step()
    waits = harness.add(prompt(5), 2, adapter="b")
    for index in range(6):
        harness.add(prompt(5, 10 * index), 30, adapter="a")
    plain = harness.add(prompt(5), 2)
    harness.step()
    assert [one.request.adapter for one in harness.scheduler.running] == ["a"] * 4 + [None]
    assert len(harness.scheduler.waiting) == 4
    harness.run()
    # The one that waited came before the last three that would have passed it.
    order = list(harness.finals)
    assert order[0] == (plain.request_id, 0)
    assert order.index((waits.request_id, 0)) == 5
    harness.assert_all_free()


def test_versions_do_not_share_blocks() -> None:
    harness = AdapterHarness("a", 2)

    def cached(adapter: str | None) -> int | None:
        request = harness.add(prompt(40), 2, adapter=adapter)
        harness.run()
        return harness.finals[request.request_id, 0].num_cached_tokens

    assert [cached("a"), cached("a"), cached(None), cached(None)] == [0, 39, 0, 39]
    harness.load("a")
    assert [cached("a"), cached("a"), cached(None)] == [0, 39, 39]


def test_what_is_unloaded_finishes_and_is_dropped() -> None:
    harness = AdapterHarness("ab", 2)
    with pytest.raises(ModelNotFoundError):
        harness.add(prompt(5), 2, adapter="c")
    old = harness.table.id_of("a")
    request = harness.add(prompt(5), 9, adapter="a", n=2)
    harness.step()
    new = harness.load("a")
    assert harness.table.take_dropped() == [] and new != old
    harness.table.remove("b")
    assert len(harness.table.take_dropped()) == 1
    with pytest.raises(ModelNotFoundError):
        harness.add(prompt(5), 2, adapter="b")
    harness.run()
    assert len(harness.tokens[request.request_id, 1]) == 9
    assert harness.table.take_dropped() == [old]
    harness.table.remove("a")
    assert harness.table.take_dropped() == [new]
    assert harness.table.sources == ()


def test_names_are_checked() -> None:
    table = AdapterTable(1, max_adapters=2)
    table.add(AdapterSource("a", "/a"))
    table.check_name("b", replace=False)
    with pytest.raises(InvalidRequestError, match="load_inplace"):
        table.check_name("a", replace=False)
    table.add(AdapterSource("b", "/b"))
    table.check_name("a", replace=True)
    with pytest.raises(InvalidRequestError, match="max-cpu-loras"):
        table.check_name("c", replace=True)


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_requests(seed: int, run_ahead: bool) -> None:
    """Requests of all kinds, aborts, preemptions, and adapters that come and go."""
    rng = random.Random(seed)
    harness = AdapterHarness(
        "abcd", 2, num_blocks=10, max_num_seqs=6, budget=24, run_ahead=run_ahead
    )
    stems = [prompt(60, 1000 * stem) for stem in range(3)]
    requests = []
    for _ in range(150):
        if rng.random() < 0.5:
            adapter = rng.choice([None, *"abcd"])
            tokens = rng.choice(stems)[: rng.randrange(1, 50)]
            kinds: list[dict[str, int]] = [
                {},
                {"n": rng.choice([1, 2, 3])},
                {"beam_width": 2, "temperature": 0.0},
            ]
            requests.append(
                harness.add(tokens, rng.randrange(1, 9), adapter=adapter, **rng.choice(kinds))
            )
        if requests and rng.random() < 0.05:
            harness.scheduler.abort_request(rng.choice(requests).request_id)
        if rng.random() < 0.03:
            harness.load(rng.choice("abcd"))
        harness.step()
    harness.run()
    assert max(map(len, harness.running)) <= 2
    for request in requests:
        if request.sampling_params.beam_width is not None:
            continue
        for choice in range(request.sampling_params.n):
            key = request.request_id, choice
            if harness.finals[key].finish_reason == "length":
                expected = expected_tokens(
                    list(request.prompt_token_ids), choice, request.sampling_params.max_tokens
                )
                assert harness.tokens[key] == expected
    harness.assert_all_free()
    assert len(harness.table._names) == 4
