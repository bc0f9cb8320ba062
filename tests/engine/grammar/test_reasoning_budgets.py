"""Budgets of reasoning in a whole engine, on a tiny random model.

Any tokens may serve as the marks of the reasoning: the tests choose them among those that the
model writes by itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire.engine.core.engine_core import EngineCore
from quire.engine.errors import InvalidRequestError
from quire.engine.process import wire
from quire.engine.reasoning import ReasoningSpec
from quire.engine.request import GrammarSpec, Request
from quire.engine.sequence import Sequence
from quire.engine.step import SchedulerOutput

from .constrained import EOS, TOKENIZER, VOCAB_SIZE, make_core, make_request, run

CLOSE = (7, 11)
"""A closing mark of two tokens, which stand for their own bytes."""


def budgeted(request: Request, budget: int | None, end: tuple[int, ...] = CLOSE) -> Request:
    spec = ReasoningSpec(
        opening=b"<none>",
        closings=(b"".join(b"<%d>" % token for token in end),),
        pieces={token: b"<%d>" % token for token in end},
        begins_inside=True,
        budget=budget,
        end=end,
    )
    return replace(request, reasoning=spec)


def requests(num: int, **params: Any) -> list[Request]:
    return [make_request(str(i), None, seed=i, max_tokens=30, **params) for i in range(num)]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_the_mark_follows_the_budget_and_nothing_else_changes(
    core: EngineCore, temperature: float
) -> None:
    plain = requests(4, temperature=temperature, n=2, ignore_eos=True)
    free = run(core, plain)
    budgets = (0, 1, 7, 25)
    cut = run(core, [budgeted(one, size) for one, size in zip(plain, budgets, strict=True)])
    for (name, choice), answer in cut.items():
        size = budgets[int(name)]
        before, mark = answer.token_ids[:size], answer.token_ids[size : size + 2]
        assert before == free[name, choice].token_ids[:size]
        assert tuple(mark) == CLOSE
        # What follows is what the model makes of a prompt with these tokens.
        prompt = (*plain[0].prompt_token_ids, *answer.token_ids[: size + 2])
        alone = replace(
            plain[int(name)],
            prompt_token_ids=prompt,
            sampling_params=replace(
                plain[int(name)].sampling_params, n=1, seed=int(name) + choice, max_tokens=28 - size
            ),
        )
        assert run(core, [alone])[name, 0].token_ids == answer.token_ids[size + 2 :]


def test_reasoning_that_ends_by_itself_is_left_alone(core: EngineCore) -> None:
    plain = requests(6, ignore_eos=True)
    free = run(core, plain)
    natural = {name: tuple(answer.token_ids[9:11]) for (name, _), answer in free.items()}
    for size in (9, 12, 200):
        cut = run(core, [budgeted(one, size, natural[one.request_id]) for one in plain])
        assert {key: one.token_ids for key, one in cut.items()} == {
            key: one.token_ids for key, one in free.items()
        }


@pytest.mark.parametrize("ahead", [False, True])
def test_preempted_and_one_ahead_a_budget_gives_the_same_tokens(
    folder: Path, core: EngineCore, ahead: bool
) -> None:
    plain = requests(8, n=3, ignore_eos=True)
    mixed = [budgeted(one, 3 * i) if i % 2 else one for i, one in enumerate(plain)]
    mixed[5] = replace(mixed[5], grammar=GrammarSpec("regex", "(.|\n)*"))
    calm = run(core, mixed)
    small = make_core(folder, num_blocks=14, max_model_len=200, async_scheduling=ahead)
    stormy = run(small, mixed)
    assert small.stats().preemptions > 3
    for key, answer in calm.items():
        assert answer.token_ids == stormy[key].token_ids, key
    assert tuple(calm["1", 2].token_ids[3:5]) == CLOSE


def test_a_grammar_goes_on_after_the_mark(core: EngineCore) -> None:
    """The grammar wants text, a mark that is text as well, and then a number."""
    end = tuple(TOKENIZER.encode("</t>").ids)
    assert len(end) > 1
    spec = ReasoningSpec(
        opening=b"<t>",
        closings=(b"</t>",),
        pieces={token: TOKENIZER.decode([token]).encode() for token in end},
        begins_inside=True,
        budget=6,
        end=end,
    )
    grammar = GrammarSpec("grammar", 'start: t /[0-9]{3}/\nt[lazy]: /(.|\\n)*/ "</t>"\n')
    request = replace(make_request("g", grammar, n=4, temperature=1.0), reasoning=spec)
    for answer in run(core, [request]).values():
        text = answer.text
        assert answer.reason == "stop" and text.count("</t>") == 1
        thoughts, number = text.split("</t>")
        assert len(number) == 3 and number.isdigit()
        at = next(i for i in range(40) if tuple(answer.token_ids[i : i + len(end)]) == end)
        # In the middle of a character the mark has to wait for the character's end.
        assert 6 <= at <= 9 and (at == 6 or not thoughts.isascii())


def test_what_bars_the_mark_gives_way(core: EngineCore) -> None:
    """Bad words, min_tokens with the mark as a stop token, and a bias cannot keep it away."""
    params = {
        "bad_words": ((CLOSE[0],), CLOSE),
        "min_tokens": 20,
        "stop_token_ids": (CLOSE[1],),
        "logit_bias": ((CLOSE[0], -100.0),),
        "logprobs": 2,
    }
    [answer] = run(core, [budgeted(*requests(1, **params), 4)]).values()
    assert tuple(answer.token_ids[4:]) == CLOSE
    assert answer.reason == "stop"


def test_an_end_of_sequence_within_the_reasoning_ends_the_answer(core: EngineCore) -> None:
    request = budgeted(*requests(1, logit_bias=((EOS, 100.0),)), 4)
    [answer] = run(core, [request]).values()
    assert answer.token_ids == [EOS] and answer.reason == "stop"


def test_once_it_is_kept_a_budget_holds_up_no_step(folder: Path) -> None:
    """One step ahead, the rows that must be read are those whose reasoning goes on."""
    core = make_core(folder, async_scheduling=True)
    scheduler = core._scheduler
    counts: list[int] = []
    original = scheduler.rows_that_read

    def rows_that_read(output: SchedulerOutput) -> list[tuple[int, Sequence]]:
        rows = original(output)
        counts.append(len(rows))
        return rows

    scheduler.rows_that_read = rows_that_read  # type: ignore[method-assign]
    [one] = requests(1, ignore_eos=True)
    run(core, [budgeted(one, 4)])
    # The prompt's step and those up to the mark read; a step ahead more may have been planned.
    assert 6 <= sum(counts) <= 8 and len(counts) >= 30 and not any(counts[10:])


def test_a_budget_crosses_to_the_engine_process() -> None:
    request = budgeted(*requests(1), 3)
    assert wire.decode_to_engine(wire.encode(wire.Add(request))) == wire.Add(request)


def test_budgets_that_cannot_be_kept_are_refused(core: EngineCore) -> None:
    for params, param in (
        ({"allowed_token_ids": (1, 2)}, "allowed_token_ids"),
        ({"beam_width": 2, "n": 2, "temperature": 0.0}, "use_beam_search"),
    ):
        with pytest.raises(InvalidRequestError) as refused:
            budgeted(make_request("x", None, **params), 3)
        assert refused.value.param == param
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        core.add_request(budgeted(make_request("x", None), 3, (VOCAB_SIZE,)))
