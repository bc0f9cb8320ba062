"""Test when a block's way is said to be faster than computing its tokens."""

from __future__ import annotations

from quire.engine.tiers.transfer_cost import MIN_TOKENS, TransferCost


def test_all_pays_until_it_is_measured() -> None:
    cost = TransferCost(16, copy_seconds=0.001)
    assert cost.copy_pays and cost.load_pays()
    cost.observe_step(MIN_TOKENS - 1, 1e-9)  # too few tokens to say anything
    cost.observe_step(MIN_TOKENS, 0.0)
    cost.observe_load(10.0)
    assert cost.copy_pays and cost.load_pays()


def test_copies_pay_against_slow_tokens_only() -> None:
    cost = TransferCost(16, copy_seconds=0.001)
    cost.observe_step(100, 100 * 0.0002)  # 3.2 ms a block, against 2 ms there and back
    assert cost.copy_pays
    assert round(cost.compute_seconds(10), 6) == 0.032
    for _ in range(20):
        cost.observe_step(100, 100 * 0.0001)
    assert not cost.copy_pays


def test_one_slow_step_does_not_change_much() -> None:
    cost = TransferCost(16, copy_seconds=0.001)
    for seconds in (0.0001, 0.0001, 10.0):
        cost.observe_step(100, 100 * seconds)
    assert cost.compute_seconds(1) < 2 * 16 * 0.0001


def test_a_slow_store_is_tried_again_some_day() -> None:
    cost = TransferCost(16, copy_seconds=0.0001)
    cost.observe_step(100, 100 * 0.0001)
    cost.observe_load(0.1)
    assert not cost.load_pays()
    assert any(cost.load_pays() for _ in range(1000))
