"""A stateful property test, in which hypothesis drives scheduler and block manager at random.

The model is not a second implementation: the fake worker's K/V read-back, `check_integrity` and
`expected_tokens` are the oracles.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quire.engine.config import SchedulingPolicy
from quire.engine.request import Request

from ..harness import Harness, expected_beams, expected_tokens
from ..tiers.stores import FaultyStore, Tasks

STEM = list(range(200, 300))
MAX_OUTPUT = 12
EOS = 2  # never sampled by the fake worker, but one of its beams' candidates


class SchedulerMachine(RuleBasedStateMachine):
    """A pool so small that sharing, copying, eviction and preemption all happen within a run."""

    policy: SchedulingPolicy = "priority"
    run_ahead = False
    snapshots: int | None = None
    windows: tuple[int | None, ...] = (None,)
    num_blocks = 12

    def tier_options(self) -> dict[str, Any]:
        """Return what the harness needs for a tier of evicted blocks, if there is to be one."""
        return {}

    def __init__(self) -> None:
        super().__init__()
        self.harness = Harness(
            num_blocks=self.num_blocks,
            budget=40,
            max_num_seqs=5,
            windows=self.windows,
            policy=self.policy,
            eos_token_ids=(EOS,),
            check=False,
            run_ahead=self.run_ahead,
            snapshots=self.snapshots,
            **self.tier_options(),
        )
        self.requests: dict[str, Request] = {}

    @rule(
        shared=st.integers(0, 70),
        tail=st.lists(st.integers(10, 12), min_size=1, max_size=20),
        max_tokens=st.integers(0, MAX_OUTPUT),
        n=st.integers(1, 3),
        priority=st.integers(0, 1),
        salt=st.sampled_from([None, "s"]),
    )
    def add(
        self,
        shared: int,
        tail: list[int],
        max_tokens: int,
        n: int,
        priority: int,
        salt: str | None,
    ) -> None:
        request = self.harness.add(
            STEM[:shared] + tail,
            max_tokens,
            n=n,
            priority=priority,
            cache_salt=salt,
            user=f"u{priority}",
        )
        self.requests[request.request_id] = request

    @rule(
        shared=st.integers(0, 70),
        tail=st.lists(st.integers(10, 12), min_size=1, max_size=20),
        max_tokens=st.integers(1, MAX_OUTPUT),
        width=st.integers(1, 3),
        early_stopping=st.sampled_from([True, False, "never"]),
        length_penalty=st.sampled_from([-1.0, 0.0, 1.0]),
        priority=st.integers(0, 1),
        data=st.data(),
    )
    def add_search(
        self,
        shared: int,
        tail: list[int],
        width: int,
        data: st.DataObject,
        **fields: Any,
    ) -> None:
        n = data.draw(st.integers(1, width))
        fields["user"] = f"u{fields['priority']}"
        request = self.harness.add(
            STEM[:shared] + tail, n=n, beam_width=width, temperature=0.0, **fields
        )
        self.requests[request.request_id] = request

    @precondition(lambda self: self.harness.loop.has_work)
    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        before = self.harness.scheduler.stats()
        for _ in range(times):
            self.harness.step()
        after = self.harness.scheduler.stats()
        for name in ("preemptions", "blocks_copied", "prefix_hits"):
            if getattr(after, name) > getattr(before, name):
                event(name)

    @precondition(lambda self: self.harness.scheduler.running)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, whole: bool) -> None:
        sequence = data.draw(st.sampled_from(self.harness.scheduler.running))
        choice = None if whole else sequence.choice
        self.harness.scheduler.abort_request(sequence.request.request_id, choice)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), choice=st.integers(0, 2))
    def abort_any(self, data: st.DataObject, choice: int) -> None:
        request_id = data.draw(st.sampled_from(list(self.requests)))
        self.harness.scheduler.abort_request(request_id, choice)

    @precondition(lambda self: self.harness.scheduler.running)
    @rule()
    def run_out_of_memory(self) -> None:
        self.harness.worker.runs_out_of_memory = lambda _: True
        self.harness.step()
        self.harness.worker.runs_out_of_memory = lambda _: False

    @rule()
    def forget_cache(self) -> None:
        self.harness.manager.forget_free()

    @invariant()
    def integrity(self) -> None:
        self.harness.check_integrity()

    def teardown(self) -> None:
        self.harness.run()
        self.harness.check_integrity()
        self.harness.assert_all_free()
        for request_id, request in self.requests.items():
            prompt = list(request.prompt_token_ids)
            params = request.sampling_params
            beams = expected_beams(prompt, params, (EOS,)) if params.beam_width else None
            for choice in range(params.n):
                final = self.harness.finals[request_id, choice]
                tokens = self.harness.tokens[request_id, choice]
                if beams is None:
                    want = expected_tokens(prompt, choice, params.max_tokens)
                else:
                    want = beams[choice]
                assert tokens == want[: len(tokens)]
                if final.finish_reason in ("length", "stop"):
                    assert tokens == want


class RunAheadMachine(SchedulerMachine):
    """A machine that launches steps before the results of the last one are known, as CUDA does."""

    run_ahead = True


class TierMachine(SchedulerMachine):
    """A machine whose evicted blocks go to a little host memory and to a bad store below it."""

    run_ahead = True
    host_slots = 5

    def tier_options(self) -> dict[str, Any]:
        self.store = FaultyStore(2 * self.host_slots + 2, chance=0.1)
        self.reads, self.writes = Tasks(), Tasks()
        below = {"store": self.store, "read": self.reads, "write": self.writes}
        return {"host_slots": self.host_slots, **below}

    @rule(steps=st.integers(0, 3))
    def copies_take_steps(self, steps: int) -> None:
        self.harness.worker.lag = max(steps, self.harness.worker.lag - 1)

    @rule(reads=st.integers(0, 3), writes=st.integers(0, 3))
    def work_below(self, reads: int, writes: int) -> None:
        self.reads.run(reads)
        self.writes.run(writes)

    @rule(talk=st.integers(1, 4), length=st.integers(60, 80))
    def go_on_with(self, talk: int, length: int) -> None:
        """Let one of some conversations go on, which evict one another."""
        request = self.harness.add(list(range(1000 * talk, 1000 * talk + length)), 2)
        self.requests[request.request_id] = request
        for _ in range(20):
            if (request.request_id, 0) in self.harness.finals:
                break
            self.reads.run(1)
            self.writes.run(1)
            self.harness.step()

    @rule()
    def time_passes(self) -> None:
        self.harness.time += 1.0

    @rule()
    def forget_all(self) -> None:
        assert self.harness.tier is not None
        self.harness.tier.clear()
        self.harness.manager.pool.forget_free()

    def teardown(self) -> None:
        assert self.harness.tier is not None
        for tier in self.harness.scheduler.stats().tiers:
            for what in ("stored", "loaded", "failures"):
                if getattr(tier, what):
                    event(f"{tier.tier} {what}")
        for _ in range(1000):
            if not self.harness.loop.has_work:
                break
            self.reads.run()
            self.writes.run()
            self.harness.step()
        super().teardown()


class FairSchedulerMachine(SchedulerMachine):
    policy = "fair"


class StatesMachine(SchedulerMachine):
    """A machine whose sequences have states beside their blocks."""

    snapshots = 3


class StatesAheadMachine(StatesMachine):
    run_ahead = True


class WindowedMachine(RunAheadMachine):
    """A machine whose layers have three groups of blocks. The pool holds three beams of 92 tokens:
    18 blocks of the full group, which they share nothing of, and 3 · 4 + 5 of each window."""

    windows = (None, 20, 20)
    num_blocks = 18 + 2 * 17


class OnlyWindowedMachine(SchedulerMachine):
    windows = (33,)
    num_blocks = 14


class GroupedTierMachine(TierMachine):
    """A machine with three groups of blocks, one of them in chunks, and tiers for all."""

    windows = (None, 20, -32)
    num_blocks = WindowedMachine.num_blocks
    host_slots = 16


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=400,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)

TestRunAhead = RunAheadMachine.TestCase
TestRunAhead.settings = settings(TestScheduler.settings, max_examples=250)

TestTier = TierMachine.TestCase
TestTier.settings = settings(TestScheduler.settings, max_examples=150)

TestWindowed = WindowedMachine.TestCase
TestWindowed.settings = settings(TestScheduler.settings, max_examples=200)

TestGroupedTier = GroupedTierMachine.TestCase
TestGroupedTier.settings = settings(TestScheduler.settings, max_examples=100)

TestOnlyWindowed = OnlyWindowedMachine.TestCase
TestOnlyWindowed.settings = settings(TestScheduler.settings, max_examples=150)

TestFairScheduler = FairSchedulerMachine.TestCase
TestFairScheduler.settings = settings(TestScheduler.settings, max_examples=150)

TestStates = StatesMachine.TestCase
TestStates.settings = settings(TestScheduler.settings, max_examples=150)

TestStatesAhead = StatesAheadMachine.TestCase
TestStatesAhead.settings = settings(TestScheduler.settings, max_examples=150)
