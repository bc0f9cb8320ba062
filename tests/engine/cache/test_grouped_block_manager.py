"""Test block tables of several groups: what windows hold, what they give back, what is found."""

from __future__ import annotations

import pytest

from quire.engine.cache.block_hashes import of_group, prompt_hashes
from quire.engine.cache.grouped_block_manager import GroupedBlockManager
from quire.engine.outputs import RowError

from ..harness import Harness, expected_tokens

SIZE = 16
TWO: tuple[int | None, ...] = (None, 40)


def manager_of(harness: Harness) -> GroupedBlockManager:
    assert isinstance(harness.manager, GroupedBlockManager)
    return harness.manager


def run(harness: Harness, tokens: list[int], max_tokens: int = 1) -> int:
    """Return how many tokens of a prompt were found."""
    request = harness.add(tokens, max_tokens)
    harness.run()
    assert harness.tokens[request.request_id, 0] == expected_tokens(tokens, 0, max_tokens)
    cached = harness.finals[request.request_id, 0].num_cached_tokens
    assert cached is not None
    return cached


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("windows", [(None, 40), (40,), (None, 100, 7), (None, -64)])
def test_windows_bound_what_a_sequence_holds(
    windows: tuple[int | None, ...], prefix_caching: bool, run_ahead: bool
) -> None:
    """At no time does a windowed group hold more than ⌈(window + chunk) / size⌉ + 1 blocks."""
    budget = 48
    harness = Harness(
        num_blocks=200,
        budget=budget,
        windows=windows,
        prefix_caching=prefix_caching,
        run_ahead=run_ahead,
    )
    harness.add(list(range(600)), max_tokens=100)
    manager, peaks = manager_of(harness), [0] * len(windows)
    step_tokens = budget * (1 + run_ahead)
    while harness.loop.has_work:
        harness.step()
        for sequence in harness.scheduler.running:
            tables = (sequence.block_table, *sequence.other_tables)
            for group, table in enumerate(tables):
                held = sum(block != manager.null_block for block in table)
                peaks[group] = max(peaks[group], held)
    for window, peak in zip(windows, peaks, strict=True):
        if window is None:
            assert peak == -(-699 // SIZE)
        else:
            assert abs(window) / SIZE <= peak <= -(-(abs(window) + step_tokens) // SIZE) + 1
    harness.assert_all_free()


def test_matches_are_exact_to_the_token_in_all_groups() -> None:
    for shared in (1, 5, 16, 20, 37, 63, 90):
        harness = Harness(num_blocks=100, windows=TWO)
        first = list(range(100))
        run(harness, first)
        assert run(harness, first[:shared] + [900 + i for i in range(30)]) == shared
        assert run(harness, first) == 99


def test_the_next_turn_finds_the_last_window_of_the_answer() -> None:
    harness = Harness(num_blocks=100, windows=TWO)
    first = list(range(20))
    run(harness, first, max_tokens=90)
    answer = expected_tokens(first, 0, 90)
    assert run(harness, [*first, *answer, 7, 8, 9]) == 20 + 89


def test_a_match_ends_where_a_window_is_complete() -> None:
    """The full group has ten blocks. The windowed one, whose window reaches back over three, lacks
    blocks 3 and 7: the longest prefix whose last three it has is of seven blocks. If it lacks
    block 5, too, that is of three."""
    harness = Harness(num_blocks=100, windows=TWO)
    tokens = list(range(170))
    request = harness.add(tokens, 1)
    harness.run()
    hashes, pool = prompt_hashes(tokens, SIZE), harness.manager.pool

    def lose(block: int) -> None:
        found = pool.lookup(of_group(hashes[block], 1))
        assert found is not None
        pool.forget(found)

    def match() -> tuple[int, int]:
        sequence = harness.scheduler.requests.add(request, 0)[0]
        harness.scheduler.requests.remove(sequence)
        found = harness.manager.match_prefix(sequence, 169)
        nulls = found.others[0].blocks.count(manager_of(harness).null_block)
        assert len(found.blocks) == len(found.others[0].blocks)
        return found.num_tokens, nulls

    assert match() == (169, 7)
    lose(3)
    lose(7)
    assert match() == (7 * SIZE, 4)
    lose(5)
    assert match() == (3 * SIZE, 0)
    harness.manager.pool.check_integrity([0] * 100)


def test_blocks_that_were_given_back_are_used_again() -> None:
    """The pool has too few blocks for the whole prompt in both groups."""
    harness = Harness(num_blocks=75 + 8, budget=64, windows=TWO)
    assert run(harness, list(range(1100)), max_tokens=100) == 0
    assert harness.scheduler.stats().preemptions == 0


def test_nothing_of_a_poisoned_sequence_is_found() -> None:
    """Its windowed group has given back most of its blocks before the row fails."""
    harness = Harness(num_blocks=100, budget=64, windows=TWO)
    request = harness.add(list(range(300)), 10)
    harness.worker.errors[request.request_id] = RowError("step_failed", "not finite")
    harness.run()
    assert harness.finals[request.request_id, 0].finish_reason == "error"
    assert not harness.manager.known_blocks() and harness.manager.pool.num_cached == 0


def test_forks_share_all_groups_and_copy_their_tails() -> None:
    harness = Harness(num_blocks=100, windows=TWO)
    prompt = list(range(87))
    request = harness.add(prompt, 60, n=4)
    harness.run()
    for choice in range(4):
        assert harness.tokens[request.request_id, choice] == expected_tokens(prompt, choice, 60)
    assert harness.manager.blocks_copied == 2 * 3  # the last owner writes in place
    harness.assert_all_free()


def test_events_tell_of_the_first_group_only() -> None:
    harness = Harness(num_blocks=100, windows=TWO)
    harness.manager.record_blocks(True)
    run(harness, list(range(100)))
    (stored,) = harness.manager.take_block_events()
    known = harness.manager.known_blocks()
    assert len(known) == 6 and stored.hashes == known  # type: ignore[union-attr]
    harness.manager.pool.forget_free()
    assert len(harness.manager.take_block_events()) == 1
    assert not harness.manager.known_blocks()
