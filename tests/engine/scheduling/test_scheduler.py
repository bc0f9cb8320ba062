"""Test the policy: which sequences compute what in a step, and that tokens never depend on it."""

from __future__ import annotations

import pytest

from quire.engine.errors import InvalidRequestError
from quire.engine.outputs import RowError
from quire.engine.scheduling.ranked_queue import SECONDS_PER_PRIORITY

from ..harness import Harness, expected_tokens, prompt


def test_one_request_runs_to_its_length() -> None:
    harness = Harness()
    request = harness.add(prompt(20), max_tokens=5)
    harness.run()
    key = (request.request_id, 0)
    assert harness.tokens[key] == expected_tokens(prompt(20), 0, 5)
    final = harness.finals[key]
    assert (final.finish_reason, final.num_cached_tokens, final.error) == ("length", 0, None)
    harness.assert_all_free()


def test_budget_chunks_a_prompt_and_still_decodes_the_others() -> None:
    harness = Harness(budget=16)
    harness.add(prompt(8), max_tokens=40)
    harness.step()
    harness.add(prompt(60, first=2000))
    sizes = []
    for _ in range(4):
        scheduled = harness.scheduler.schedule()
        sizes.append(scheduled.num_new_tokens)
        harness.scheduler.update_from_output(scheduled, harness.worker.execute(scheduled))
    assert sizes == [[1, 15]] * 4


def test_a_chunk_that_goes_first_leaves_each_decode_its_token() -> None:
    harness = Harness(budget=8, policy="priority")
    for i in range(3):
        harness.add(prompt(2, first=10 * i), max_tokens=40, priority=1)
    harness.step()
    harness.add(prompt(50, first=500), priority=0)
    harness.step()
    scheduled = harness.scheduler.schedule()
    assert scheduled.num_new_tokens == [5, 1, 1, 1]


def test_preemption_keeps_tokens_and_order() -> None:
    harness = Harness(num_blocks=6, prefix_caching=False)
    requests = [harness.add(prompt(30, first=100 * i), max_tokens=30) for i in range(3)]
    harness.run()
    assert harness.scheduler.stats().preemptions > 0
    finals = [harness.finals[request.request_id, 0].timings for request in requests]
    counted = sum(timings.num_preemptions for timings in finals if timings is not None)
    assert counted == harness.scheduler.stats().preemptions
    for i, request in enumerate(requests):
        want = expected_tokens(prompt(30, first=100 * i), 0, 30)
        assert harness.tokens[request.request_id, 0] == want
    harness.assert_all_free()


def test_the_youngest_is_preempted_and_none_is_admitted_in_that_step() -> None:
    harness = Harness(num_blocks=4)
    old = harness.add(prompt(30), max_tokens=30)
    young = harness.add(prompt(30, first=2000), max_tokens=30)
    while not harness.scheduler.stats().preemptions:
        scheduled = harness.scheduler.schedule()
        harness.scheduler.update_from_output(scheduled, harness.worker.execute(scheduled))
    assert harness.worker.request_ids(scheduled) == [old.request_id]
    assert harness.scheduler.waiting.peek().request is young
    assert len(scheduled.released) == 1


def test_priority_policy_orders_by_priority_then_arrival() -> None:
    harness = Harness(max_num_seqs=1, policy="priority")
    late = harness.add(prompt(4), priority=5)
    first = harness.add(prompt(4), priority=-1)
    second = harness.add(prompt(4), priority=-1)
    harness.run()
    ends = [request_id for request_id, _ in harness.finals]
    assert ends == [first.request_id, second.request_id, late.request_id]


def test_waiting_raises_a_priority() -> None:
    harness = Harness(max_num_seqs=1, policy="priority")
    at_last, low, later = (
        harness.add(prompt(4), priority=priority, arrival_time=float(arrival))
        for priority, arrival in ((0, 4 * SECONDS_PER_PRIORITY), (3, 0), (0, 100))
    )
    harness.run()
    ends = [request_id for request_id, _ in harness.finals]
    assert ends == [later.request_id, low.request_id, at_last.request_id]


def test_fcfs_ignores_priority() -> None:
    harness = Harness(max_num_seqs=1)
    first = harness.add(prompt(4), priority=5)
    second = harness.add(prompt(4), priority=-5)
    harness.run()
    assert [i for i, _ in harness.finals] == [first.request_id, second.request_id]


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 64, 100])
def test_forks_share_the_prompt_and_diverge(length: int, block_size: int) -> None:
    harness = Harness(block_size=block_size)
    request = harness.add(prompt(length), max_tokens=40, n=4)
    harness.run()
    for choice in range(4):
        want = expected_tokens(prompt(length), choice, 40)
        assert harness.tokens[request.request_id, choice] == want
    # The prompt is computed once; each sibling computes its last token and its own output.
    assert harness.worker.num_tokens == (length - 1) + 4 * 40
    harness.assert_all_free()


def test_forks_hold_the_prompt_once_and_a_tail_each() -> None:
    harness = Harness(block_size=64, num_blocks=40)
    harness.add(prompt(1000), max_tokens=8, n=8)
    most = 0
    while harness.scheduler.has_work:
        harness.step()
        stats = harness.scheduler.stats()
        most = max(most, stats.num_blocks - stats.num_free_blocks)
    assert most <= 1000 // 64 + 8


def test_forks_beyond_max_num_seqs_wait_and_find_the_prompt() -> None:
    harness = Harness(max_num_seqs=2, budget=512)
    request = harness.add(prompt(100), max_tokens=5, n=5)
    harness.run()
    for choice in range(5):
        want = expected_tokens(prompt(100), choice, 5)
        assert harness.tokens[request.request_id, choice] == want
    assert harness.worker.num_tokens < 200  # five times the prompt would be 500


def test_forks_survive_preemption() -> None:
    harness = Harness(num_blocks=7)
    request = harness.add(prompt(40), max_tokens=40, n=3)
    harness.run()
    assert harness.scheduler.stats().preemptions > 0
    for choice in range(3):
        want = expected_tokens(prompt(40), choice, 40)
        assert harness.tokens[request.request_id, choice] == want
    harness.assert_all_free()


@pytest.mark.parametrize("warm_up_steps", [0, 1, 2, 4])
def test_aborts_end_each_choice_once(warm_up_steps: int) -> None:
    harness = Harness(budget=16)
    request = harness.add(prompt(30), max_tokens=50, n=3)
    other = harness.add(prompt(10, first=500), max_tokens=6)
    for _ in range(warm_up_steps):
        harness.step()
    harness.scheduler.abort_request(request.request_id, 1)
    harness.step()
    assert harness.finals[request.request_id, 1].finish_reason == "abort"
    harness.scheduler.abort_request(request.request_id)
    harness.scheduler.abort_request("never heard of")
    harness.run()
    assert {harness.finals[request.request_id, i].finish_reason for i in range(3)} == {"abort"}
    assert harness.tokens[other.request_id, 0] == expected_tokens(prompt(10, first=500), 0, 6)
    harness.assert_all_free()


def test_abort_of_the_first_choice_hands_the_prompt_to_the_next() -> None:
    harness = Harness(budget=16)
    request = harness.add(prompt(40), max_tokens=3, n=3)
    harness.step()
    harness.scheduler.abort_request(request.request_id, 0)
    harness.run()
    for choice in (1, 2):
        want = expected_tokens(prompt(40), choice, 3)
        assert harness.tokens[request.request_id, choice] == want
    harness.assert_all_free()


def test_stop_tokens_and_end_of_sequence() -> None:
    harness = Harness(sample=lambda sequence: sequence.num_output_tokens, eos_token_ids=(2,))
    by_eos = harness.add(prompt(4), max_tokens=10)
    by_id = harness.add(prompt(4), max_tokens=10, stop_token_ids=(1,))
    ignoring = harness.add(prompt(4), max_tokens=10, ignore_eos=True)
    harness.run()
    ends = {
        request_id: (final.finish_reason, final.stop_reason)
        for (request_id, _), final in harness.finals.items()
    }
    assert ends[by_eos.request_id] == ("stop", None)
    assert ends[by_id.request_id] == ("stop", 1)
    assert ends[ignoring.request_id] == ("length", None)
    assert harness.tokens[by_eos.request_id, 0] == [0, 1, 2]


def test_max_tokens_zero_computes_the_prompt_only() -> None:
    harness = Harness()
    request = harness.add(prompt(20), max_tokens=0)
    harness.run()
    assert harness.tokens[request.request_id, 0] == []
    assert harness.finals[request.request_id, 0].finish_reason == "length"


def test_deadlines() -> None:
    harness = Harness(max_num_seqs=1)
    running = harness.add(prompt(4), max_tokens=100, deadline=10.0, queue_deadline=5.0)
    waiting = harness.add(prompt(4), max_tokens=100, deadline=100.0, queue_deadline=5.0)
    harness.step()
    harness.time = 6.0
    harness.step()
    final = harness.finals[waiting.request_id, 0]
    assert final.error is not None and final.error.code == "queue_timeout"
    harness.time = 11.0
    harness.run()
    final = harness.finals[running.request_id, 0]
    assert final.error is not None and final.error.code == "request_timeout"
    harness.assert_all_free()


def test_only_the_failing_row_fails_and_its_blocks_are_forgotten() -> None:
    harness = Harness()
    bad = harness.add(prompt(40), max_tokens=50)
    good = harness.add(prompt(40, first=3000), max_tokens=8)
    harness.step()
    harness.worker.errors[bad.request_id] = RowError("non_finite_logits", "NaN")
    harness.run()
    error = harness.finals[bad.request_id, 0].error
    assert error is not None and error.code == "non_finite_logits"
    assert harness.tokens[good.request_id, 0] == expected_tokens(prompt(40, first=3000), 0, 8)
    harness.assert_all_free()
    again = harness.add(prompt(40), max_tokens=2)
    harness.run()
    assert harness.finals[again.request_id, 0].num_cached_tokens == 0


def test_out_of_memory_halves_the_load_and_recovers() -> None:
    harness = Harness(budget=64)
    requests = [harness.add(prompt(60, first=100 * i), max_tokens=4) for i in range(2)]
    harness.worker.forward(harness.scheduler.schedule())
    harness.scheduler.reduce_load()
    sizes = []
    while harness.scheduler.has_work:
        before = harness.worker.num_tokens
        harness.step()
        sizes.append(harness.worker.num_tokens - before)
    assert sizes[0] == 32 and max(sizes) > 32
    for i, request in enumerate(requests):
        want = expected_tokens(prompt(60, first=100 * i), 0, 4)
        assert harness.tokens[request.request_id, 0] == want


def test_a_request_that_runs_out_of_memory_by_itself_fails() -> None:
    harness = Harness(budget=64)
    request = harness.add(prompt(60))
    for _ in range(8):
        if not harness.scheduler.has_work:
            break
        harness.scheduler.schedule()
        harness.scheduler.reduce_load()
    harness.run()
    error = harness.finals[request.request_id, 0].error
    assert error is not None and error.code == "device_out_of_memory"
    harness.assert_all_free()


def test_out_of_memory_raises_no_budget() -> None:
    """A budget may be smaller than a block; the worker has room for no larger step."""
    harness = Harness(budget=5)
    prompts = [prompt(2), prompt(40, first=3000)]
    requests = [harness.add(tokens) for tokens in prompts]
    harness.worker.forward(harness.scheduler.schedule())
    harness.scheduler.reduce_load()
    harness.run()
    for request, tokens in zip(requests, prompts, strict=True):
        assert harness.tokens[request.request_id, 0] == expected_tokens(tokens, 0, 4)


def test_a_request_id_in_use_is_refused() -> None:
    harness = Harness()
    harness.add(prompt(4), request_id="same")
    with pytest.raises(InvalidRequestError):
        harness.add(prompt(4), request_id="same")
    harness.run()
    harness.add(prompt(4), request_id="same")


def test_the_engines_seed_makes_unseeded_requests_repeat() -> None:
    def seeds(seed: int | None) -> list[int]:
        harness = Harness(seed=seed)
        for _ in range(3):
            harness.add(prompt(4))
        harness.step()
        return [sequence.seed for sequence in harness.scheduler.running]

    assert seeds(7) == seeds(7) and len(set(seeds(7))) == 3
    assert seeds(None) != seeds(None)
