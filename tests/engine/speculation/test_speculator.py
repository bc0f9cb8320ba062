"""How many tokens are drafted: what was right before, and what a step costs."""

from __future__ import annotations

import pytest

from quire.engine.sequence import Rank, Sequence
from quire.engine.speculation.acceptance import FIRST_LENGTH, Acceptance
from quire.engine.speculation.model import ModelDrafter
from quire.engine.speculation.speculator import Speculator
from quire.engine.speculation.step_cost import MAX_TOKENS, StepCost
from quire.engine.step import UNKNOWN_TOKEN

from ..harness import make_request


class Fixed:
    """Proposes the same tokens always."""

    name, prior = "fixed", 0.5

    def propose(self, sequence: Sequence, k: int) -> list[int]:
        return list(range(3, 3 + k))

    def forget(self, seq_id: int) -> None:
        """Keep nothing."""


class Linear(StepCost):
    """Each further token costs so much of the first."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self._shape = [1 + slope * (tokens - 1) for tokens in range(MAX_TOKENS + 1)]


def _sequences(count: int, max_tokens: int = 100) -> list[tuple[int, Sequence]]:
    requests = [make_request([1, 2, 3], max_tokens) for _ in range(count)]
    return [
        (row, Sequence(request, 0, row, Rank(0, row, 0), frozenset()))
        for row, request in enumerate(requests)
    ]


def _drafted(speculator: Speculator, rows: list[tuple[int, Sequence]], budget: int = 64) -> int:
    return sum(len(one.token_ids) for one in speculator.choose(rows, len(rows), budget))


def test_lengths_double_or_follow_what_was_right() -> None:
    acceptance = Acceptance()
    assert acceptance.length == FIRST_LENGTH
    acceptance.observe("a", 0.5, 4, 4)
    assert acceptance.length == 8
    acceptance.observe("a", 0.5, 8, 2)
    assert acceptance.length == 3
    acceptance.observe("a", 0.5, 3, 0)
    assert acceptance.length == 1
    acceptance.observe("a", 0.5, 1, 1)
    assert acceptance.length == 2


def test_rates_follow_each_drafter_and_recover_unused() -> None:
    acceptance = Acceptance()
    for _ in range(20):
        acceptance.observe("good", 0.5, 3, 3)
        acceptance.observe("bad", 0.5, 3, 0)
    assert acceptance.rate("good", 0.5) > 0.95
    assert acceptance.rate("bad", 0.5) < 0.05
    assert acceptance.rate("new", 0.7) == 0.7
    for _ in range(100):
        acceptance.skip("bad", 0.5)
    assert acceptance.rate("bad", 0.5) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("slope", "rows", "drafted"),
    [
        (0.0, 1, 4),  # free tokens are all taken
        (0.1, 1, 2),  # 1 + .5 + .25 tokens for 1.2; the next brings .125 for .1 of a step of 1.46
        (0.6, 1, 0),  # half a token is not worth 0.6 of a step
        (1.0, 8, 0),
    ],
)
def test_drafts_are_as_long_as_they_pay(slope: float, rows: int, drafted: int) -> None:
    speculator = Speculator([Fixed()], max_draft=8, max_samples=64, cost=Linear(slope))
    assert _drafted(speculator, _sequences(rows)) == drafted


def test_drafts_are_bounded() -> None:
    """By the budget, by the samples of a step, by max_draft, and by the end of the answer."""
    free = Linear(0.0)
    assert (
        _drafted(Speculator([Fixed()], max_draft=3, max_samples=64, cost=free), _sequences(1)) == 3
    )
    assert (
        _drafted(Speculator([Fixed()], max_draft=8, max_samples=5, cost=free), _sequences(3)) == 2
    )
    speculator = Speculator([Fixed()], max_draft=8, max_samples=64, cost=free)
    assert _drafted(speculator, _sequences(3), budget=7) == 4
    assert _drafted(speculator, _sequences(1, max_tokens=3)) == 2
    assert _drafted(speculator, _sequences(1, max_tokens=1)) == 0
    assert _drafted(Speculator([], max_draft=8, max_samples=64, cost=free), _sequences(1)) == 0


def test_costs_are_learnt_and_never_fall_with_tokens() -> None:
    cost = StepCost()
    for _ in range(400):
        cost.observe(1, 0.010)
        cost.observe(4, 0.030)
    assert cost(4) / cost(1) == pytest.approx(3.0, rel=0.1)
    costs = [cost(tokens) for tokens in range(1, MAX_TOKENS + 1)]
    assert costs == sorted(costs)
    before = cost(4)
    cost.observe(4, 5.0)  # something else held the step up
    assert cost(4) == before
    cost.observe(MAX_TOKENS + 1, 1.0)  # larger steps say nothing


def test_longer_contexts_change_the_scale_and_not_the_shape() -> None:
    cost = StepCost()
    for milliseconds in range(10, 40):
        cost.observe(1, milliseconds / 1000)
        cost.observe(3, 1.2 * milliseconds / 1000)
    assert 1.1 < cost(3) / cost(1) < 1.3


# -- a draft model ---------------------------------------------------------------------------


class Pass(Linear):
    """A pass of the draft model costs so much of a step."""

    def __init__(self, slope: float, cost: float) -> None:
        super().__init__(slope)
        self._cost = cost

    def draft_pass(self, rows: int) -> float:
        return self._cost


@pytest.mark.parametrize(
    ("cost", "drafted"),
    [
        (0.0, 4),
        (0.4, 2),  # 1 + .7 + .49 tokens for 1.8; the next brings .34 for .4 of a step of 1.22
        (0.8, 0),
    ],
)
def test_drafts_of_a_model_pay_for_its_passes(cost: float, drafted: int) -> None:
    speculator = Speculator(
        [], max_draft=8, max_samples=64, cost=Pass(0.0, cost), model=ModelDrafter()
    )
    chosen = speculator.choose(_sequences(1), 1, 64)
    assert [one.token_ids for one in chosen] == ([[UNKNOWN_TOKEN] * drafted] if drafted else [])


def test_a_drafter_without_passes_drafts_where_a_model_does_not_pay() -> None:
    cost = Pass(0.0, 0.8)
    for drafters, drafted in (([], 0), ([Fixed()], 16)):
        speculator = Speculator(
            drafters, max_draft=2, max_samples=64, cost=cost, model=ModelDrafter()
        )
        assert _drafted(speculator, _sequences(8)) == drafted


def test_a_drafter_that_costs_nothing_goes_first_until_it_is_wrong() -> None:
    speculator = Speculator(
        [Fixed()], max_draft=4, max_samples=64, cost=Pass(0.0, 0.3), model=ModelDrafter()
    )
    ((_, sequence),) = rows = _sequences(1)

    def names(count: int, tokens: list[int]) -> list[str]:
        """Draft so often, while these tokens come after each draft."""
        found = []
        for _ in range(count):
            (draft,) = speculator.choose(rows, 1, 64)
            found.append(draft.source.name)
            if draft.source.name == "model":
                right = len(draft.token_ids)
            else:
                pairs = zip(draft.token_ids, tokens, strict=False)
                right = sum(mine == theirs for mine, theirs in pairs)
            speculator.verified(sequence, len(draft.token_ids), tokens[: right + 1])
        return found

    # 1. The tokens are those of the model, and not the others' 3, 4, 5, 6.
    first = names(12, [9, 9, 9, 9, 9])
    assert first[0] == "fixed" and first[-1] == "model"
    # 2. The tokens become the others'. They were passed over, but compared with what came.
    second = names(20, [3, 4, 5, 6, 7])
    assert second[0] == "model" and second[-1] == "fixed"


def test_the_cost_of_a_pass_is_learned_and_a_bad_measurement_forgotten() -> None:
    cost = StepCost()
    for _ in range(50):
        cost.observe(1, 1e-2)
    for _ in range(50):
        cost.observe_passes(5, 1, 5 * 6e-3)
    assert cost.draft_pass(1) == pytest.approx(0.6, abs=0.05)
    assert cost.draft_pass(8) > cost.draft_pass(1)
    for _ in range(500):
        cost.forget_passes()
    assert cost.draft_pass(1) == pytest.approx(0.2, abs=0.05)
