"""Test that a grammar that fails, or is slow to compile, affects no other request."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from quire.engine.core.engine_core import EngineCore
from quire.engine.errors import GrammarError, InvalidRequestError, error_from_code
from quire.engine.grammar import compile as grammar
from quire.engine.grammar import masks as structured_output
from quire.engine.grammar import slow_rows
from quire.engine.grammar.masks import StructuredOutput
from quire.engine.request import GrammarSpec
from quire.engine.sequence import ReadingRow

from .constrained import END_OF_TEXT, GRAMMARS, TOKENIZER, VOCAB_SIZE, make_core, make_request, run


def test_a_grammar_that_does_not_compile_fails_only_its_request(core: EngineCore) -> None:
    """The HTTP process refuses such grammars, but an engine that gets one must survive it."""
    bad = GrammarSpec("regex", "(a")
    answers = run(core, [make_request("bad", bad, n=2), make_request("good", GRAMMARS["regex"][0])])
    for choice in range(2):
        final = answers["bad", choice].final
        assert final is not None and final.error is not None
        assert (final.finish_reason, final.error.code) == ("error", "grammar_failed")
        assert isinstance(error_from_code(*final.error), GrammarError)
    assert answers["good", 0].reason == "stop"


def test_a_matcher_that_fails_ends_only_its_choice(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = "victim"
    original = StructuredOutput._row

    def row(self: StructuredOutput, one: ReadingRow) -> Any:
        result, sequence = original(self, one), one.sequence
        if sequence.choice == 1 and sequence.request.request_id == failing:
            # As if a token had been sampled that was not allowed.
            return result._replace(token_ids=[END_OF_TEXT] if sequence.num_output_tokens else [])
        return result

    monkeypatch.setattr(StructuredOutput, "_row", row)
    spec = GRAMMARS["regex"][0]
    answers = run(core, [make_request(failing, spec, n=3), make_request("other", spec)])
    reasons = {key: answer.reason for key, answer in answers.items()}
    assert reasons.pop((failing, 1)) == "error"
    assert set(reasons.values()) == {"stop"}
    assert len(answers[failing, 1].token_ids) == 1


def test_a_failure_outside_all_rows_ends_only_constrained_rows(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(matcher: Any) -> str:
        raise RuntimeError("borrowed")

    monkeypatch.setattr(structured_output, "matcher_failure", fail)
    requests = [
        make_request("c", GRAMMARS["regex"][0]),
        make_request("f", None, max_tokens=4),
    ]
    answers = run(core, requests)
    final = answers["c", 0].final
    assert final is not None and final.error is not None
    assert final.error.code == "grammar_failed" and "borrowed" in final.error.message
    assert len(answers["f", 0].token_ids) == 4


def test_a_request_can_be_aborted_while_its_grammar_is_compiled(folder: Path) -> None:
    core = make_core(folder)
    core.add_request(make_request("a", GRAMMARS["regex"][0], n=2))
    core.abort_request("a")
    outputs = core.step().outputs
    assert [output.finish_reason for output in outputs] == ["abort", "abort"]
    assert not core.has_work
    assert not core._structured._requests


def test_grammars_of_requests_that_have_left_are_not_compiled(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    compiled = []
    original = grammar.compile_grammar

    def slow(tokenizer: Any, spec: GrammarSpec) -> Any:
        release.wait(20)
        if spec.kind == "regex" and spec.text.startswith(("running", "a")):
            compiled.append(spec.text)  # not what another engine still compiles
        return original(tokenizer, spec)

    monkeypatch.setattr(structured_output, "compile_grammar", slow)
    core.add_request(make_request("running", GrammarSpec("regex", "running")))
    for number in range(50):
        core.add_request(make_request(f"r{number}", GrammarSpec("regex", f"a{number % 40}")))
    for number in range(49):  # r49 waits for the grammar of r9
        core.abort_request(f"r{number}")
    core.add_request(make_request("back", GrammarSpec("regex", "a3")))  # before the step
    core.step()
    release.set()
    while core.has_work:
        core.step()
    assert compiled == ["running", "a3", "a9"]


def test_other_requests_continue_while_a_grammar_is_compiled(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    original = grammar.compile_grammar

    def slow(tokenizer: Any, spec: GrammarSpec) -> Any:
        release.wait(20)
        return original(tokenizer, spec)

    monkeypatch.setattr(structured_output, "compile_grammar", slow)
    core.add_request(make_request("slow", GrammarSpec("regex", "[xyz]{4}")))
    core.add_request(make_request("plain", None, max_tokens=5, ignore_eos=True))
    outputs = [output for _ in range(8) for output in core.step().outputs]
    assert {output.request_id for output in outputs} == {"plain"}
    assert outputs[-1].finish_reason == "length"
    release.set()
    while core.has_work:
        outputs += core.step().outputs
    tokens = [t for o in outputs if o.request_id == "slow" for t in o.token_ids]
    assert re.fullmatch("[xyz]{4}", str(TOKENIZER.decode(tokens)))


def test_an_engine_that_cannot_constrain_says_so(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request("r", GRAMMARS["regex"][0])
    with pytest.raises(InvalidRequestError, match="end-of-sequence"):
        StructuredOutput(VOCAB_SIZE, (), TOKENIZER.to_str).check(request)
    monkeypatch.setattr(structured_output, "is_available", lambda: False)
    with pytest.raises(InvalidRequestError, match="llguidance"):
        core.add_request(request)
    assert not core.has_work
    with pytest.raises(InvalidRequestError, match="beam"):
        make_request("b", GRAMMARS["regex"][0], beam_width=2, temperature=0.0)


def test_the_engine_imports_without_llguidance(tmp_path: Path) -> None:
    code = "import sys; sys.modules['llguidance'] = None; import quire.engine.core.engine_core"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True)


AMBIGUOUS = GrammarSpec("grammar", 'start: s\ns: s s s | s s | "a" | "b"')


def test_an_ambiguous_grammar_fails_by_name_while_others_go_on(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_rows, "SLOW_SECONDS", 0.002)
    monkeypatch.setattr(slow_rows, "ROW_SECONDS", 0.002)
    monkeypatch.setattr(slow_rows, "REQUEST_SECONDS", 0.1)
    fine = GrammarSpec("regex", "[a-f]{150}")
    answers = run(
        core,
        [
            make_request("hard", AMBIGUOUS, n=2, max_tokens=150, min_tokens=150),
            make_request("fine", fine, max_tokens=200),
        ],
    )
    assert answers["fine", 0].reason == "stop" and len(answers["fine", 0].text) == 150
    for choice in range(2):
        final = answers["hard", choice].final
        assert final is not None and final.error is not None
        assert (final.finish_reason, final.error.code) == ("error", "grammar_failed")
        assert "ambiguous" in final.error.message


def test_rows_are_masked_alike_whether_they_are_timed_or_not(core: EngineCore) -> None:
    requests = [make_request(name, spec) for name, (spec, _) in GRAMMARS.items()]
    untimed = run(core, requests)
    core._structured._timed_steps = 10**6
    timed = run(core, requests)
    assert {key: answer.token_ids for key, answer in timed.items()} == {
        key: answer.token_ids for key, answer in untimed.items()
    }
