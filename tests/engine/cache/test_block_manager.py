"""Test the block manager: what it finds, what it copies, and how many blocks that takes."""

from __future__ import annotations

from quire.engine.sequence import Rank, Sequence

from ..harness import Harness, expected_tokens, make_request


def make_sequence(num_tokens: int, choice: int = 0) -> Sequence:
    request = make_request(list(range(num_tokens)))
    return Sequence(request, choice, 0, Rank(0, 0, choice), frozenset())


def run_pair(first: list[int], second: list[int], max_tokens: int = 1, **fields: object) -> int:
    """Return how many tokens of `second` are cached after `first` has finished."""
    harness = Harness(**fields)  # type: ignore[arg-type]
    harness.add(first, max_tokens)
    harness.run()
    request = harness.add(second, 5)
    harness.run()
    assert harness.tokens[request.request_id, 0] == expected_tokens(second, 0, 5)
    cached = harness.finals[request.request_id, 0].num_cached_tokens
    assert cached is not None
    return cached


def test_the_same_prompt_is_cached_up_to_its_last_token() -> None:
    for length in (2, 15, 16, 17, 31, 32, 33, 100):
        assert run_pair(list(range(length)), list(range(length))) == length - 1


def test_sharing_is_exact_to_the_token() -> None:
    for shared in (1, 5, 16, 20, 37, 63):
        first = list(range(64))
        second = first[:shared] + [900 + i for i in range(30)]
        assert run_pair(first, second) == shared
        assert run_pair(first, second, block_size=64) == shared


def test_a_running_sequence_is_shared_including_its_growing_tail() -> None:
    harness = Harness()
    harness.add(list(range(40)), max_tokens=30)
    for _ in range(5):
        harness.step()
    request = harness.add(list(range(40)), max_tokens=2)
    harness.run()
    assert harness.finals[request.request_id, 0].num_cached_tokens == 39


def test_decoded_tokens_are_found_by_the_next_turn() -> None:
    harness = Harness()
    first = list(range(20))
    harness.add(first, max_tokens=30)
    harness.run()
    answer = expected_tokens(first, 0, 30)
    request = harness.add(first + answer + [7, 8, 9], max_tokens=2)
    harness.run()
    # The last sampled token was never fed back, so its K/V does not exist.
    assert harness.finals[request.request_id, 0].num_cached_tokens == 20 + 29


def test_requests_with_different_salts_share_nothing() -> None:
    harness = Harness()
    prompt = list(range(50))
    cached = []
    for salt in ("a", "b", None, "a", None):
        request = harness.add(prompt, 1, cache_salt=salt)
        harness.run()
        cached.append(harness.finals[request.request_id, 0].num_cached_tokens)
    assert cached == [0, 0, 0, 49, 49]


def test_nothing_is_shared_without_prefix_caching() -> None:
    prompt = list(range(50))
    assert run_pair(prompt, prompt, prefix_caching=False) == 0


def test_thirty_two_requests_hold_their_common_prompt_once() -> None:
    harness = Harness(num_blocks=400, budget=4096, max_num_seqs=32)
    common = list(range(2048))
    harness.add(common + [5000], max_tokens=40)
    harness.step()
    for i in range(31):
        harness.add(common + [5001 + i] * 20, max_tokens=40)
    peak = 0
    while harness.scheduler.has_work:
        harness.step()
        stats = harness.scheduler.stats()
        peak = max(peak, stats.num_blocks - stats.num_free_blocks)
    suffix_blocks = 32 * -(-(20 + 40) // 16)
    assert peak <= 1.1 * (2048 // 16) + suffix_blocks


def test_cached_blocks_are_reused_tail_first_and_only_when_needed() -> None:
    harness = Harness(num_blocks=8)
    first = list(range(64))
    harness.add(first, max_tokens=1)
    harness.run()
    assert harness.scheduler.stats().num_cached_blocks == 4
    harness.add([900 + i for i in range(90)], max_tokens=1)  # 6 blocks: 4 plain, 2 cached
    harness.run()
    request = harness.add(first, max_tokens=1)
    harness.run()
    assert harness.finals[request.request_id, 0].num_cached_tokens == 32


def test_a_request_as_large_as_the_pool_runs_though_its_copy_source_is_cached() -> None:
    harness = Harness(num_blocks=4)
    harness.add(list(range(60)), max_tokens=1)
    harness.run()
    request = harness.add(list(range(50)) + [99, 98], max_tokens=13)
    harness.run()
    assert harness.finals[request.request_id, 0].finish_reason == "length"
    harness.assert_all_free()


def test_forget_free_empties_the_cache() -> None:
    harness = Harness()
    harness.add(list(range(50)), max_tokens=1)
    harness.run()
    harness.manager.pool.forget_free()
    harness.check_integrity()
    assert harness.scheduler.stats().num_cached_blocks == 0
    request = harness.add(list(range(50)), max_tokens=1)
    harness.run()
    assert harness.finals[request.request_id, 0].num_cached_tokens == 0
