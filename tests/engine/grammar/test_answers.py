"""Test the answers of a whole engine that follow a grammar, on a tiny random model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from quire.engine.core.engine_core import EngineCore
from quire.engine.request import GrammarSpec

from .constrained import (
    EOS,
    GRAMMARS,
    INTEGER,
    SCHEMAS,
    TOKENIZER,
    json_spec,
    make_core,
    make_request,
    record,
    run,
)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_answers_follow_thirty_schemas(core: EngineCore, temperature: float) -> None:
    requests = [
        make_request(str(number), json_spec(schema), temperature=temperature, n=3)
        for number, schema in enumerate(SCHEMAS)
    ]
    answers = run(core, requests)
    assert len(answers) == 3 * len(SCHEMAS) == 90
    complete = 0
    for (name, _), answer in answers.items():
        if answer.reason == "length":
            continue
        assert answer.reason == "stop", answer.final
        jsonschema.validate(
            json.loads(answer.text),
            SCHEMAS[int(name)],
            format_checker=jsonschema.FormatChecker(),
        )
        complete += 1
    assert complete > 75


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_answers_follow_other_grammars(core: EngineCore, temperature: float) -> None:
    requests = [
        make_request(name, spec, temperature=temperature, n=3)
        for name, (spec, _) in GRAMMARS.items()
    ]
    complete = set()
    for (name, _), answer in run(core, requests).items():
        if answer.reason == "stop":
            assert re.fullmatch(GRAMMARS[name][1], answer.text), (name, answer.text)
            complete.add(name)
        else:
            assert (name, answer.reason) == ("lark", "length")
    assert complete == set(GRAMMARS)


def test_structural_tags_leave_text_free_and_enforce_their_schemas(core: EngineCore) -> None:
    tags = {
        "triggers": ["{"],
        "structures": [{"begin": "{{n=", "schema": INTEGER, "end": "}}"}],
    }
    spec = GrammarSpec("structural_tag", json.dumps(tags))
    # A logit bias towards "{" makes the random model spell the trigger.
    brace = TOKENIZER.token_to_id("{")
    answers = run(core, [make_request("t", spec, n=6, logit_bias=((brace, 8.0),), ignore_eos=True)])
    texts = [answer.text for answer in answers.values()]
    calls = [call for text in texts for call in re.findall(r"\{.{0,12}", text) if len(call) == 13]
    assert len(calls) > 10
    for call in calls:
        assert re.match(r"\{\{n=-?[0-9]+\}\}", call), call


def test_answers_do_not_depend_on_other_rows(core: EngineCore) -> None:
    """Constrained and unconstrained requests give the same answers together and one by one."""
    specs = [None, json_spec(SCHEMAS[20]), None, GRAMMARS["regex"][0], json_spec(SCHEMAS[8])]
    requests = [make_request(str(i), spec, max_tokens=30) for i, spec in enumerate(specs)]
    together = run(core, requests)
    for request in requests:
        key = (request.request_id, 0)
        assert run(core, [request])[key].token_ids == together[key].token_ids


@pytest.mark.parametrize("ahead", [False, True])
def test_a_preempted_sequence_continues_where_it_stopped(
    folder: Path, core: EngineCore, ahead: bool
) -> None:
    spec = json_spec({"type": "array", "items": INTEGER, "minItems": 12, "maxItems": 20})
    requests = [make_request(str(i), spec, seed=i, n=3) for i in range(3)]
    calm = run(core, requests)
    small = make_core(folder, num_blocks=14, max_model_len=200, async_scheduling=ahead)
    stormy = run(small, requests)
    assert small.stats().preemptions > 5
    for key, answer in calm.items():
        assert answer.reason == stormy[key].reason == "stop"
        assert answer.token_ids == stormy[key].token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_one_step_ahead_gives_the_same_tokens_in_at_most_two_more_steps(
    folder: Path, temperature: float
) -> None:
    """Run plain and constrained requests, bad words and a grammar that ends early.

    One step ahead, they get the same tokens in the same number of steps, except for up to two steps
    that were launched before an end was known.
    """
    specs = [None, json_spec(SCHEMAS[20]), None, json_spec(SCHEMAS[0]), json_spec(SCHEMAS[15])]
    requests = [
        make_request(str(i), spec, max_tokens=40, temperature=temperature, n=1 + i % 2)
        for i, spec in enumerate(specs)
    ]
    words = tuple((token,) for token in range(300, 550))
    requests.append(make_request("words", None, max_tokens=40, bad_words=words))
    answers, steps = [], []
    for ahead in (False, True):
        core = make_core(folder, max_num_seqs=16, async_scheduling=ahead)
        run(core, requests)  # compiles the grammars
        core.reset_prefix_cache()
        before = core.stats().step
        answers.append(run(core, requests))
        steps.append(core.stats().step - before)
    assert answers[0].keys() == answers[1].keys() and len(answers[0]) == 8
    for key, answer in answers[0].items():
        assert (answer.token_ids, answer.reason) == (
            answers[1][key].token_ids,
            answers[1][key].reason,
        )
    assert {answer.reason for answer in answers[0].values()} == {"stop", "length"}
    assert 40 <= steps[0] <= steps[1] <= steps[0] + 2


def test_the_end_of_the_grammar_ends_the_answer(core: EngineCore) -> None:
    spec = GrammarSpec("regex", "(ab)+")
    cases: dict[str, dict[str, Any]] = {
        "ignore_eos": {"ignore_eos": True},
        "min_tokens": {"min_tokens": 9},
        "both": {"ignore_eos": True, "min_tokens": 30},
    }
    for name, params in cases.items():
        longer = run(core, [make_request(name, spec, max_tokens=40, n=4, **params)])
        for answer in longer.values():
            assert re.fullmatch("(ab)*a?", answer.text)
            assert len(answer.token_ids) >= (9 if name == "min_tokens" else 40)
        closed = GrammarSpec("choice", '["ab"]')  # nothing may follow
        for answer in run(core, [make_request(name, closed, max_tokens=40, **params)]).values():
            assert (answer.text, answer.reason) == ("ab", "stop")
            assert answer.token_ids[-1] == EOS


def test_whitespace_is_bounded(core: EngineCore) -> None:
    """A model that strongly prefers whitespace still finishes."""
    spaces = [t for t, i in TOKENIZER.get_vocab().items() if set(t) <= set("ĠĊ\t")]
    bias = tuple((TOKENIZER.token_to_id(space), 50.0) for space in spaces)
    spec = json_spec(record(a=INTEGER, b={"type": "boolean"}))
    answers = run(core, [make_request("w", spec, n=3, logit_bias=bias, max_tokens=400)])
    for answer in answers.values():
        assert answer.reason == "stop"
        assert len(answer.text) > 20
        assert "\n\n" not in answer.text
        jsonschema.validate(json.loads(answer.text), record(a=INTEGER, b={"type": "boolean"}))
