"""What each drafter proposes."""

from __future__ import annotations

from typing import Any

import pytest

from quire.engine.cache.block_manager import BlockManager
from quire.engine.sequence import Rank, Sequence
from quire.engine.speculation.cached import CachedDrafter
from quire.engine.speculation.ngram import NgramDrafter
from quire.engine.speculation.prediction import PredictionDrafter

from ..harness import Harness, expected_tokens, make_request, prompt


def _sequence(tokens: list[int], output: list[int], **fields: Any) -> Sequence:
    request = make_request(tokens, 100, **fields)
    sequence = Sequence(request, 0, 0, Rank(0, 0, 0), frozenset())
    sequence.token_ids.extend(output)
    return sequence


@pytest.mark.parametrize(
    ("tokens", "draft"),
    [
        ([1, 2, 3, 4, 5, 6, 9, 2, 3, 4, 5], [6, 9, 2]),  # four tokens are found
        ([7, 1, 2, 3, 8, 1, 2, 4, 1, 2], [4, 1, 2]),  # the later of two places
        ([1, 2, 3, 8, 7, 2, 3, 9, 5, 1, 2, 3], [8, 7, 2]),  # three tokens rather than two
        ([5, 5, 5, 5], [5, 5, 5]),  # a repetition goes on, past the end of what is known
        ([1, 2, 1, 2, 1], [2, 1, 2]),
        ([1, 2, 3, 4, 5], []),  # nothing was there before
        ([1], []),
        ([4, 4], []),  # one token is no evidence
        # Bytes that match between tokens do not count: 0x01000000 holds those of 1.
        ([0x0100, 0x010000, 7, 1, 0], []),
    ],
)
def test_ngrams_continue_the_latest_occurrence(tokens: list[int], draft: list[int]) -> None:
    for known in range(1, len(tokens) + 1):
        drafter = NgramDrafter()
        sequence = _sequence(tokens[:known], [])
        drafter.propose(sequence, 3)  # tokens that come later are appended to what it keeps
        sequence.token_ids.extend(tokens[known:])
        assert drafter.propose(sequence, 3) == draft
        drafter.forget(sequence.seq_id)
        assert not drafter._texts


def test_a_prediction_is_followed_left_and_found_again() -> None:
    predicted = tuple(range(20, 40))
    sequence = _sequence([1, 2], [], prediction=predicted)
    drafter = PredictionDrafter()
    assert drafter.propose(sequence, 4) == [20, 21, 22, 23]
    sequence.token_ids += [20, 21]
    assert drafter.propose(sequence, 2) == [22, 23]
    sequence.token_ids += [99, 98]  # the answer differs: wait where it left
    assert drafter.propose(sequence, 2) == [22, 23]
    sequence.token_ids += [27, 28, 29]  # and comes back further on
    assert drafter.propose(sequence, 3) == [30, 31, 32]
    sequence.token_ids += list(range(30, 40))
    assert drafter.propose(sequence, 3) == []
    assert drafter.propose(_sequence([1, 2], []), 3) == []
    drafter.forget(sequence.seq_id)
    assert sequence.seq_id not in drafter._places


def test_the_cache_continues_with_what_another_sequence_had() -> None:
    """It crosses blocks, respects salts, and never reads the sequence's own blocks."""
    manager = BlockManager(64, 16)
    drafter = CachedDrafter(manager)
    tokens = prompt(70)
    done = _sequence(tokens, [])
    assert manager.allocate_slots(done, 70) is not None
    done.num_computed_tokens = 70
    manager.commit_full_blocks(done)
    for known in (1, 15, 16, 17, 40, 48, 63):
        asking = _sequence(tokens[:known], [])
        assert drafter.propose(asking, 30) == tokens[known : known + 30]
    assert drafter.propose(_sequence([*tokens[:20], 7], []), 4) == []
    assert drafter.propose(_sequence(tokens[:20], [], cache_salt="other"), 4) == []
    assert drafter.propose(done, 4) == []
    manager.free(done)
    assert drafter.propose(_sequence(tokens[:64], []), 30) == tokens[64:70]
    manager.pool.forget_free()
    assert drafter.propose(_sequence(tokens[:64], []), 30) == []
    unshared = BlockManager(64, 16, enable_prefix_caching=False)
    assert CachedDrafter(unshared).propose(_sequence(tokens[:20], []), 4) == []


def test_a_repeated_request_is_answered_by_the_cache() -> None:
    from .drafters import FreeDrafts, Speculator

    harness = Harness()
    speculator = Speculator(
        [CachedDrafter(harness.manager)], max_draft=7, max_samples=64, cost=FreeDrafts()
    )
    harness = Harness(speculator=speculator)
    speculator._drafters = [CachedDrafter(harness.manager)]
    steps = []
    for _ in range(2):
        before = harness.scheduler.stats().step
        request = harness.add(prompt(20), 60)
        harness.run()
        assert harness.tokens[request.request_id, 0] == expected_tokens(prompt(20), 0, 60)
        steps.append(harness.scheduler.stats().step - before)
    assert steps[0] >= 58
    assert steps[1] <= 20
