"""Test beam search in the scheduler: sharing, freeing and the order in which searches wait.

The fake worker reads back the K/V of every row, so a wrong share, a missed copy or a block that was
freed too early raises.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from quire.engine.errors import InvalidRequestError, PoolTooSmallError
from quire.engine.outputs import RowError
from quire.engine.request import Request

from ..harness import Harness, expected_beams, expected_tokens, make_request, prompt

EOS = 2


def add(harness: Harness, token_ids: list[int], width: int, **fields: Any) -> Request:
    fields = {"n": width, "temperature": 0.0, "ignore_eos": True} | fields
    return harness.add(token_ids, beam_width=width, **fields)


def assert_found(harness: Harness, request: Request) -> None:
    params = request.sampling_params
    stop_ids = (*params.stop_token_ids, *(() if params.ignore_eos else (EOS,)))
    want = expected_beams(list(request.prompt_token_ids), params, stop_ids)
    got = [harness.tokens[request.request_id, choice] for choice in range(params.n)]
    assert got == want


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_best_hypotheses_are_found(length: int, width: int, block_size: int) -> None:
    harness = Harness(block_size=block_size)
    request = add(harness, prompt(length), width, max_tokens=40)
    harness.run()
    assert_found(harness, request)
    # The prompt once, then each step one token of each beam; the last token is not fed back.
    assert harness.worker.num_tokens == length + 39 * width
    harness.assert_all_free()


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-2.0, 0.0, 1.0, 3.0])
def test_stop_tokens_and_min_tokens(early_stopping: Any, length_penalty: float) -> None:
    harness = Harness(eos_token_ids=(EOS,))
    fields: dict[str, Any] = {
        "early_stopping": early_stopping,
        "length_penalty": length_penalty,
        "ignore_eos": False,
    }
    requests = [
        add(
            harness,
            prompt(30, 50 * i),
            4,
            max_tokens=20,
            min_tokens=i,
            stop_token_ids=(7,),
            **fields,
        )
        for i in range(8)
    ]
    harness.run()
    reasons = set()
    for request in requests:
        assert_found(harness, request)
        for choice in range(4):
            key = (request.request_id, choice)
            last, final = harness.tokens[key][-1], harness.finals[key]
            assert final.stop_reason == (7 if last == 7 else None)
            assert final.finish_reason == ("stop" if last in (EOS, 7) else "length")
            reasons.add(final.finish_reason)
    assert "stop" in reasons


def test_n_may_be_smaller_than_the_beam_width() -> None:
    harness = Harness()
    request = add(harness, prompt(20), 5, n=2, max_tokens=10)
    harness.run()
    assert_found(harness, request)
    assert {choice for _, choice in harness.finals} == {0, 1}


def test_beams_hold_what_they_share_once() -> None:
    """Eight beams share a prompt of 1000 tokens and add 200 tokens each."""
    harness = Harness(num_blocks=1024)
    add(harness, prompt(1000), 8, max_tokens=200)
    most, unshared = 0, 0
    while harness.scheduler.has_work:
        harness.step()
        stats = harness.scheduler.stats()
        most = max(most, stats.num_blocks - stats.num_free_blocks)
        tables = [sequence.block_table for sequence in harness.scheduler.running]
        unshared = max(unshared, sum(map(len, tables)))
    assert unshared == 8 * (1199 // 16 + 1)
    assert most < 0.2 * unshared
    assert most <= 1000 // 16 + 8 * (1199 // 16 + 1 - 1000 // 16)


def test_a_tail_is_copied_for_all_children_but_one() -> None:
    """The last holder writes in place, so there are never more copies than forks."""
    harness = Harness()
    add(harness, prompt(20), 4, max_tokens=30)
    forks = copies = 0
    while harness.scheduler.has_work:
        before = harness.manager.blocks_copied
        tails = [s.block_table[-1] for s in harness.scheduler.running if s.num_computed_tokens % 16]
        harness.step()
        forks += len(tails) - len(set(tails))
        copies += harness.manager.blocks_copied - before
    assert copies == forks > 10


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("num_blocks", [17, 20, 26])
def test_a_preempted_search_finds_the_same_hypotheses(
    num_blocks: int, prefix_caching: bool
) -> None:
    harness = Harness(num_blocks=num_blocks, prefix_caching=prefix_caching, budget=64)
    plain, searches = [], []
    for i in range(3):
        plain.append(harness.add(prompt(40, first=500 * i), max_tokens=60))
        searches.append(add(harness, prompt(60, first=500 * i), 3, max_tokens=50))
    harness.run()
    assert harness.scheduler.stats().preemptions > 0
    for i, (other, search) in enumerate(zip(plain, searches, strict=True)):
        assert_found(harness, search)
        want = expected_tokens(prompt(40, first=500 * i), 0, 60)
        assert harness.tokens[other.request_id, 0] == want
    harness.assert_all_free()


def test_a_search_that_just_fits_runs_to_its_end() -> None:
    """`check_fits` is exact to the block: a request that it accepts can run."""
    for width, length, max_tokens in ((2, 31, 40), (3, 16, 33), (5, 47, 17), (4, 1, 64)):
        request = make_request(
            prompt(length), max_tokens, n=width, beam_width=width, temperature=0.0, ignore_eos=True
        )
        fits = {"vocab_size": 2000, "max_model_len": 500, "block_size": 16, "can_generate": True}
        fits |= {"group_windows": (None,), "step_tokens": 256}
        num_blocks = length // 16 + width * (-(-(length + max_tokens - 1) // 16) - length // 16)
        request.check_fits(SimpleNamespace(num_blocks=num_blocks, **fits))
        with pytest.raises(PoolTooSmallError, match=f"{width} beams .*: {num_blocks} blocks"):
            request.check_fits(SimpleNamespace(num_blocks=num_blocks - 1, **fits))
        for prefix_caching in (True, False):
            harness = Harness(num_blocks=num_blocks, prefix_caching=prefix_caching)
            harness.scheduler.add_request(request)
            harness.run(max_steps=1000)
            assert_found(harness, request)
            harness.assert_all_free()


def test_a_search_uses_a_cached_prompt() -> None:
    harness = Harness()
    for _ in range(2):
        request = add(harness, prompt(100), 3, max_tokens=5)
        harness.run()
        assert_found(harness, request)
    assert harness.finals[request.request_id, 0].num_cached_tokens == 99


def test_a_search_waits_for_seats_for_all_its_beams() -> None:
    harness = Harness(max_num_seqs=4)
    first = harness.add(prompt(20), max_tokens=8)
    search = add(harness, prompt(30), 4, max_tokens=6)
    last = harness.add(prompt(10), max_tokens=6)
    harness.run()
    assert [request_id for request_id, _ in harness.finals] == [
        first.request_id,
        *[search.request_id] * 4,
        last.request_id,
    ]
    assert_found(harness, search)
    with pytest.raises(InvalidRequestError):
        add(harness, prompt(30), 5, max_tokens=6)


@pytest.mark.parametrize("warm_up_steps", [0, 1, 2, 5])
@pytest.mark.parametrize("choice", [None, 1])
def test_an_abort_ends_the_whole_search(warm_up_steps: int, choice: int | None) -> None:
    harness = Harness(budget=16)
    search = add(harness, prompt(20), 4, n=2, max_tokens=30)
    other = harness.add(prompt(10), max_tokens=8)
    for _ in range(warm_up_steps):
        harness.step()
    harness.scheduler.abort_request(search.request_id, choice)
    harness.run()
    finals = [harness.finals[search.request_id, i] for i in range(2)]
    assert [(final.finish_reason, final.token_ids) for final in finals] == [("abort", [])] * 2
    assert harness.tokens[other.request_id, 0] == expected_tokens(prompt(10), 0, 8)
    harness.assert_all_free()


def test_a_preempted_search_can_be_aborted() -> None:
    harness = Harness(num_blocks=10)
    harness.add(prompt(30), max_tokens=100)
    search = add(harness, prompt(40, first=2000), 3, max_tokens=40)
    while not harness.scheduler.stats().preemptions:
        harness.step()
    assert not any(sequence.request is search for sequence in harness.scheduler.running)
    harness.scheduler.abort_request(search.request_id)
    harness.run()
    assert harness.finals[search.request_id, 0].finish_reason == "abort"
    harness.assert_all_free()


def test_a_failing_beam_fails_only_its_search() -> None:
    harness = Harness()
    search = add(harness, prompt(20), 3, max_tokens=30)
    other = harness.add(prompt(10, first=50), max_tokens=8)
    for _ in range(4):
        harness.step()
    error = RowError("non_finite_logits", "NaN")
    harness.worker.errors[search.request_id] = error
    harness.run()
    assert [harness.finals[search.request_id, i].error for i in range(3)] == [error] * 3
    assert harness.tokens[other.request_id, 0] == expected_tokens(prompt(10, first=50), 0, 8)
    harness.assert_all_free()
    again = add(harness, prompt(20), 3, max_tokens=4, request_id="again")
    harness.run()
    assert harness.finals[again.request_id, 0].num_cached_tokens == 0  # nothing of it was kept


def test_a_deadline_ends_the_whole_search_once() -> None:
    harness = Harness()
    search = add(harness, prompt(20), 3, max_tokens=30, deadline=5.0)
    harness.step()
    harness.step()
    harness.time = 6.0
    harness.run()
    for choice in range(3):
        error = harness.finals[search.request_id, choice].error
        assert error is not None and error.code == "request_timeout"
    harness.assert_all_free()


def test_out_of_memory_preempts_a_search_as_a_whole() -> None:
    harness = Harness(budget=64)
    search = add(harness, prompt(40), 3, max_tokens=20)
    for _ in range(5):
        harness.step()
    for _ in range(2):
        harness.worker.execute(harness.scheduler.schedule())  # and its results are lost
        harness.scheduler.reduce_load()
        harness.check_integrity()
    assert harness.scheduler.has_work
    harness.run()
    assert_found(harness, search)
    harness.assert_all_free()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.0}, "temperature"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"logit_bias": ((1, 1.0),)}, "logit_bias"),
        ({"allowed_token_ids": (1,)}, "allowed_token_ids"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": 11.0}, "length_penalty"),
    ],
)
def test_options_that_a_search_does_not_support_are_refused(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        make_request([1], **{"beam_width": 2, "temperature": 0.0, "max_tokens": 4} | fields)
    assert refused.value.param == param


def test_more_beams_than_the_vocabulary_can_serve_are_refused() -> None:
    request = make_request([1], n=4, beam_width=4, temperature=0.0)
    request.sampling_params.check_vocabulary(8)
    with pytest.raises(InvalidRequestError):
        request.sampling_params.check_vocabulary(7)
