"""Random drafters under the scheduler: the same tokens, no block lost, nothing wrong indexed."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.sequence import Sequence
from quire.engine.speculation.model import ModelDrafter
from quire.engine.speculation.speculator import Speculator

from ..harness import Harness, expected_tokens, prompt
from .drafters import FreeDrafts, RandomDrafter, always


def _answers(sequence: Sequence) -> list[int]:
    tokens = list(sequence.request.prompt_token_ids)
    return expected_tokens(tokens, sequence.choice, sequence.request.sampling_params.max_tokens)


@settings(max_examples=120, deadline=None)
@given(
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(12, 60),
    budget=st.integers(4, 64),
    max_num_seqs=st.integers(1, 8),
    run_ahead=st.booleans(),
    by_model=st.booleans(),
    requests=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(1, 3), st.booleans()),
        min_size=1,
        max_size=8,
    ),
)
def test_tokens_are_those_without_drafts(
    right: float,
    seed: int,
    num_blocks: int,
    budget: int,
    max_num_seqs: int,
    run_ahead: bool,
    by_model: bool,
    requests: list[tuple[int, int, int, bool]],
) -> None:
    """Small pools preempt, equal prompts share blocks, and integrity is checked in each step. The
    drafts are the scheduler's own, or the worker's."""
    speculator = always(RandomDrafter(_answers, right, seed))
    if by_model:
        speculator = Speculator(
            [], max_draft=7, max_samples=64, cost=FreeDrafts(), model=ModelDrafter()
        )
    harness = Harness(
        num_blocks=num_blocks,
        budget=budget,
        max_num_seqs=max_num_seqs,
        run_ahead=run_ahead,
        speculator=speculator,
    )
    harness.worker.right, harness.worker.chance = right, random.Random(seed)
    added = []
    for index, (length, max_tokens, n, same) in enumerate(requests):
        max_tokens = min(max_tokens, num_blocks * 16 - length)
        first = 1000 if same else 1000 * index
        added.append(harness.add(prompt(length, first), max_tokens, n=n))
    harness.run()
    for request in added:
        params = request.sampling_params
        for choice in range(params.n):
            tokens = list(request.prompt_token_ids)
            expected = expected_tokens(tokens, choice, params.max_tokens)
            assert harness.tokens[request.request_id, choice] == expected
            assert harness.finals[request.request_id, choice].finish_reason == "length"
    harness.assert_all_free()
    counts = speculator.counts
    assert counts.accepted_tokens <= counts.draft_tokens
    if by_model and right == 1.0:
        assert counts.accepted_tokens == counts.draft_tokens
    if right == 0.0:
        assert counts.accepted_tokens <= counts.draft_tokens * 0.2 + 5  # chance hits of 100 tokens


def _steps(harness: Harness) -> int:
    return harness.scheduler.stats().step


def test_right_drafts_save_steps() -> None:
    steps = {}
    for right in (0.0, 1.0):
        harness = Harness(speculator=always(RandomDrafter(_answers, right, 1)))
        harness.add(prompt(20), 60)
        harness.run()
        steps[right] = _steps(harness)
    assert steps[0.0] >= 55
    assert steps[1.0] <= 30


class _Sometimes(RandomDrafter):
    """Drafts only in the last steps, and counts how often it is asked."""

    asked = 0

    def propose(self, sequence: Sequence, k: int) -> list[int]:
        self.asked += 1
        return super().propose(sequence, k) if sequence.num_output_tokens > 100 else []


def test_one_step_ahead_no_step_waits_for_drafts_that_do_not_come() -> None:
    """Each eighth step looks whether there are drafts again, and they come back."""
    drafter = _Sometimes(_answers, 1.0, 6)
    harness = Harness(run_ahead=True, speculator=always(drafter))
    request = harness.add(prompt(20), 150)
    harness.run()
    assert harness.tokens[request.request_id, 0] == expected_tokens(prompt(20), 0, 150)
    assert harness.worker.num_fed_back > 70
    assert 12 < drafter.asked < 60
    assert harness.scheduler.stats().accepted_tokens > 20


def test_a_stop_token_inside_a_draft_ends_the_sequence() -> None:
    tokens = expected_tokens(prompt(20), 0, 40)
    stop = tokens[17]
    end = tokens.index(stop)
    harness = Harness(speculator=always(RandomDrafter(_answers, 1.0, 2)))
    request = harness.add(prompt(20), 40, stop_token_ids=(stop,))
    harness.run()
    assert harness.tokens[request.request_id, 0] == tokens[: end + 1]
    final = harness.finals[request.request_id, 0]
    assert (final.finish_reason, final.stop_reason) == ("stop", stop)
    harness.assert_all_free()


def test_drafts_wait_while_prompts_are_computed_and_leave_blocks_to_rows() -> None:
    drafted: list[bool] = []
    harness = Harness(num_blocks=4, budget=32, speculator=always(RandomDrafter(_answers, 1.0, 3)))
    forward = harness.worker.forward

    def record(output: Any) -> Any:
        drafted.append(bool(output.drafts))
        if output.partial_rows or max(output.num_new_tokens, default=1) > 8:
            assert not output.drafts
        return forward(output)

    harness.worker.forward = record  # type: ignore
    first = harness.add(prompt(10), 20)
    second = harness.add(prompt(40, 5000), 8)
    harness.run()
    assert any(drafted)
    assert harness.scheduler.stats().preemptions <= 1
    for request in (first, second):
        tokens = list(request.prompt_token_ids)
        expected = expected_tokens(tokens, 0, request.sampling_params.max_tokens)
        assert harness.tokens[request.request_id, 0] == expected


def test_a_row_that_fails_ends_with_its_error_and_frees_its_blocks() -> None:
    from quire.engine.outputs import RowError

    harness = Harness(speculator=always(RandomDrafter(_answers, 1.0, 4)))
    bad, good = harness.add(prompt(20), 30), harness.add(prompt(20, 4000), 30)
    for _ in range(3):
        harness.step()
    harness.worker.errors[bad.request_id] = RowError("step_failed", "as told")
    harness.run()
    assert harness.finals[bad.request_id, 0].finish_reason == "error"
    assert harness.tokens[good.request_id, 0] == expected_tokens(prompt(20, 4000), 0, 30)
    harness.assert_all_free()
