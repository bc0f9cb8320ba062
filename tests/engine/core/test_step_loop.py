"""One step ahead of its results: what is dropped, what waits, and what a fault does meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from quire.engine.errors import DeviceMemoryError
from quire.engine.outputs import RowError
from quire.engine.step import UNKNOWN_TOKEN, SamplingConstraints, SchedulerOutput
from quire.engine.worker_protocol import Forward, Results

from ..harness import Harness, expected_tokens

PROMPT = list(range(1000, 1040))
OTHER = list(range(3000, 3040))


def make_harness(**options: Any) -> Harness:
    return Harness(run_ahead=True, **options)


def launches(harness: Harness) -> list[list[tuple[str, int]]]:
    """Filled as the harness runs: of each step its rows, as request and number of tokens."""
    made: list[list[tuple[str, int]]] = []
    forward = harness.worker.forward

    def record(output: SchedulerOutput) -> Forward:
        names = harness.worker.request_ids(output)
        made.append(list(zip(names, output.num_new_tokens, strict=True)))
        return forward(output)

    harness.worker.forward = record  # type: ignore
    return made


def test_a_token_is_scheduled_before_the_last_one_is_known() -> None:
    harness = make_harness()
    request = harness.add(PROMPT, max_tokens=4)
    assert harness.step() == []  # launched, and no results yet
    (sequence,) = harness.scheduler.running
    assert sequence.token_ids == [*PROMPT, UNKNOWN_TOKEN]
    assert (sequence.num_computed_tokens, sequence.num_in_flight) == (0, len(PROMPT))
    want = expected_tokens(PROMPT, 0, 4)
    assert [output.token_ids for output in harness.step()] == [want[:1]]
    assert sequence.token_ids == [*PROMPT, want[0], UNKNOWN_TOKEN]
    assert (sequence.num_computed_tokens, sequence.num_in_flight) == (len(PROMPT), 1)
    harness.run()
    assert harness.tokens[request.request_id, 0] == want
    assert harness.worker.num_fed_back == 3
    harness.assert_all_free()


def test_the_last_token_for_length_is_not_run_past() -> None:
    """Its end is known beforehand: no step is wasted, and no block is taken."""
    harness = make_harness()
    made = launches(harness)
    harness.add(PROMPT[:16], max_tokens=17)
    harness.run()
    assert harness.worker.num_tokens == 16 + 16
    assert [len(rows) for rows in made] == [1] * 17 + [0]


def test_a_token_past_a_stop_is_dropped() -> None:
    harness = make_harness()
    made = launches(harness)
    want = expected_tokens(PROMPT, 0, 9)
    stop = harness.add(PROMPT, max_tokens=9, stop_token_ids=(want[3],))
    harness.run()
    final = harness.finals[stop.request_id, 0]
    assert final.finish_reason == "stop" and harness.tokens[stop.request_id, 0] == want[:4]
    assert len([rows for rows in made if rows]) == 5  # one of them past the end
    harness.assert_all_free()
    again = harness.add(PROMPT + want[:4] + [7], max_tokens=2)  # its blocks are as they should be
    harness.run()
    assert harness.finals[again.request_id, 0].num_cached_tokens == len(PROMPT) + 3
    assert harness.tokens[again.request_id, 0] == expected_tokens(PROMPT + want[:4] + [7], 0, 2)


def test_nothing_in_flight_is_shared() -> None:
    """A prompt's blocks are found once results say that they are computed, and not before."""
    harness = make_harness()
    harness.add(PROMPT, max_tokens=2)
    harness.step()
    early = harness.add([*PROMPT, 5], max_tokens=1)
    harness.step()
    late = harness.add([*PROMPT, 6], max_tokens=1)
    harness.run()
    assert harness.finals[early.request_id, 0].num_cached_tokens == 0
    assert harness.finals[late.request_id, 0].num_cached_tokens == len(PROMPT)


@pytest.mark.parametrize("again", [False, True])
def test_an_abort_in_flight_frees_at_once(again: bool) -> None:
    harness = make_harness()
    request = harness.add(PROMPT, max_tokens=9)
    other = harness.add(OTHER, max_tokens=9)
    for _ in range(3):
        harness.step()
    harness.scheduler.abort_request(request.request_id)
    assert [sequence.request for sequence in harness.scheduler.running] == [other]
    if again:  # its id may be used again while its last step is in flight
        beams = {"beam_width": 2, "temperature": 0.0}
        harness.add(OTHER[:20], max_tokens=3, request_id=request.request_id, **beams)
    harness.step()
    assert harness.finals.pop((request.request_id, 0)).finish_reason == "abort"
    harness.run()
    assert ((request.request_id, 0) in harness.finals) == again
    assert harness.tokens[other.request_id, 0] == expected_tokens(OTHER, 0, 9)
    harness.assert_all_free()


def test_a_row_that_fails_was_launched_once_more() -> None:
    harness = make_harness()
    bad = harness.add(PROMPT, max_tokens=9)
    good = harness.add(OTHER, max_tokens=9)
    harness.step()
    harness.worker.errors[bad.request_id] = RowError("non_finite_logits", "NaN")
    harness.run()
    error = harness.finals[bad.request_id, 0].error
    assert error is not None and error.code == "non_finite_logits"
    assert harness.tokens[good.request_id, 0] == expected_tokens(OTHER, 0, 9)
    harness.assert_all_free()


def test_preempted_in_flight_the_token_stays() -> None:
    harness = make_harness(num_blocks=6, max_num_seqs=2)
    requests = [harness.add(prompt, max_tokens=30) for prompt in (PROMPT, OTHER)]
    harness.run()
    assert harness.scheduler.stats().preemptions > 0
    for request, prompt in zip(requests, (PROMPT, OTHER), strict=True):
        assert harness.tokens[request.request_id, 0] == expected_tokens(prompt, 0, 30)
    harness.assert_all_free()


def test_whose_sampling_reads_its_tokens_gets_one_each_step() -> None:
    """The last results are in before it is sampled (which the harness checks), not before its
    forward: nobody misses a step, ends a step late or is run past a stop more than once."""
    harness = make_harness()
    made = launches(harness)
    plain = harness.add(OTHER, max_tokens=9)
    want = expected_tokens(PROMPT, 0, 9)
    reads = harness.add(PROMPT, max_tokens=9, bad_words=((4, 5),))
    stops = harness.add(PROMPT, max_tokens=9, bad_words=((4, 5),), stop_token_ids=(want[3],))
    harness.run()
    assert harness.tokens[plain.request_id, 0] == expected_tokens(OTHER, 0, 9)
    assert harness.tokens[reads.request_id, 0] == want
    assert harness.tokens[stops.request_id, 0] == want[:4]
    assert [len(rows) for rows in made] == [3] * 5 + [2] * 4 + [0]
    assert harness.worker.num_fed_back == 8 + 8 + 4
    harness.assert_all_free()


@pytest.mark.parametrize("fails_at", range(1, 8))
def test_out_of_memory_with_results_brought_in_meanwhile(fails_at: int) -> None:
    """The step fails when the last one's results are in already, once a sequence's last."""
    harness = make_harness()
    want = expected_tokens(PROMPT, 0, 9)
    plain = harness.add(OTHER, max_tokens=9)
    stops = harness.add(PROMPT, max_tokens=9, bad_words=((4, 5),), stop_token_ids=(want[3],))
    forward = harness.worker.forward
    left = iter(range(fails_at, -1, -1))

    class FailsLate:
        def sample(self, constraints: SamplingConstraints) -> Results:
            raise DeviceMemoryError("the device ran out of memory in a step")

    def fail_late(output: SchedulerOutput) -> Forward:
        step = forward(output)
        return FailsLate() if next(left, -1) == 0 else step

    harness.worker.forward = fail_late  # type: ignore
    harness.run()
    assert harness.tokens[plain.request_id, 0] == expected_tokens(OTHER, 0, 9)
    assert harness.tokens[stops.request_id, 0] == want[:4]
    assert next(left, None) is None
    harness.assert_all_free()


def test_beams_are_waited_for() -> None:
    """By those beside them, too, as long as they run."""
    harness = make_harness()
    plain = harness.add(OTHER, max_tokens=12)
    request = harness.add(PROMPT, max_tokens=4, beam_width=2, temperature=0.0)
    while (request.request_id, 0) not in harness.finals:
        assert harness.worker.num_fed_back == 0
        harness.step()
    harness.run()
    assert 5 < harness.worker.num_fed_back < 9
    assert harness.tokens[plain.request_id, 0] == expected_tokens(OTHER, 0, 12)


def test_siblings_fork_when_their_prompt_is_computed() -> None:
    harness = make_harness(budget=16)
    request = harness.add(PROMPT, max_tokens=8, n=3)
    harness.run()
    for choice in range(3):
        want = expected_tokens(PROMPT, choice, 8)
        assert harness.tokens[request.request_id, choice] == want
    assert harness.worker.num_tokens == len(PROMPT) - 1 + 3 * 8
    assert harness.worker.num_fed_back == 3 * 7


@pytest.mark.parametrize("run_ahead", [False, True])
def test_out_of_memory_ends_the_offender_alone(run_ahead: bool) -> None:
    """Whoever else is there comes through, though the offender fits in no step at all."""
    harness = Harness(run_ahead=run_ahead, budget=64)
    before = harness.add(OTHER, max_tokens=20)
    offender = harness.add(PROMPT, max_tokens=20)
    after = [harness.add([i, *OTHER], max_tokens=20) for i in range(50, 53)]
    for _ in range(6):
        harness.step()

    def runs_out(output: SchedulerOutput) -> bool:
        return offender.request_id in harness.worker.request_ids(output)

    harness.worker.runs_out_of_memory = runs_out
    harness.run(max_steps=300)
    error = harness.finals[offender.request_id, 0].error
    assert error is not None and error.code == "device_out_of_memory"
    assert harness.tokens[before.request_id, 0] == expected_tokens(OTHER, 0, 20)
    for i, request in enumerate(after, start=50):
        assert harness.tokens[request.request_id, 0] == expected_tokens([i, *OTHER], 0, 20)
    harness.assert_all_free()


@pytest.mark.parametrize("run_ahead", [False, True])
def test_out_of_memory_for_a_large_step_passes_with_smaller_ones(run_ahead: bool) -> None:
    harness = Harness(run_ahead=run_ahead, budget=64)
    harness.worker.runs_out_of_memory = lambda output: output.total_tokens > 20
    requests = [harness.add([i, *OTHER], max_tokens=5) for i in range(50, 53)]
    harness.run(max_steps=300)
    for i, request in enumerate(requests, start=50):
        assert harness.tokens[request.request_id, 0] == expected_tokens([i, *OTHER], 0, 5)
    harness.assert_all_free()


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_fault_of_the_device_is_not_a_rows(run_ahead: bool) -> None:
    """It leaves the loop, so that the engine's process ends and its supervisor starts another."""
    harness = Harness(run_ahead=run_ahead)
    harness.add(PROMPT)

    def fail() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Fails:
        def sample(self, constraints: SamplingConstraints) -> Results:
            return fail

    harness.worker.forward = lambda output: Fails()  # type: ignore
    with pytest.raises(RuntimeError, match="illegal memory access"):
        for _ in range(2):
            harness.step()
