"""Test grammars that do not compile, and tokenizers that cannot be constrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quire.engine.grammar.compile import GrammarCompileError, compile_grammar, make_tokenizer
from quire.engine.request import GrammarSpec

from .constrained import EOS, TOKENIZER, VOCAB_SIZE

DEMO = Path(__file__).resolve().parents[3] / "configs/demo"
TOKENIZER_JSON = (DEMO / "tokenizer.json").read_text(encoding="utf-8")


def json_spec(schema: Any) -> GrammarSpec:
    return GrammarSpec("json", json.dumps(schema))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (GrammarSpec("regex", "(a"), "unclosed"),
        (json_spec({"type": "wat"}), "wat"),
        (json_spec({"not": {}}), "not"),
        (json_spec({"$ref": "http://127.0.0.1:9/x"}), "retriev"),
        (json_spec({"$ref": "#"}), "nothing can continue"),
        (GrammarSpec("grammar", "start: foo"), "foo"),
        (GrammarSpec("grammar", "root ::= ("), "GBNF"),
        (GrammarSpec("choice", "1"), "iterable"),
        (GrammarSpec("structural_tag", '{"triggers": ["a"]}'), "structures"),
        (GrammarSpec("structural_tag", "[]"), "indices"),
    ],
)
def test_a_grammar_that_does_not_compile_says_why(spec: GrammarSpec, reason: str) -> None:
    tokenizer = make_tokenizer(TOKENIZER_JSON, 1600, [2])
    with pytest.raises(GrammarCompileError, match=reason) as caught:
        compile_grammar(tokenizer, spec)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_token_bytes_is_refused_in_one_line() -> None:
    tokenizer = json.loads(TOKENIZER_JSON)
    tokenizer["decoder"] = tokenizer["pre_tokenizer"] = None
    with pytest.raises(GrammarCompileError, match="cannot be constrained") as caught:
        make_tokenizer(json.dumps(tokenizer), 1600, [2])
    assert "\n" not in str(caught.value)


NESTED = [
    (GrammarSpec("json", '{"type":"integer"}'), ["12"], ["x", "1.5"]),
    (GrammarSpec("regex", r"a/b\/c[/]d|é\d+"), ["a/b/c/d", "é12"], ["a/b", "a"]),
    (GrammarSpec("regex", "a\nb|c\\\nd"), ["a\nb", "c\nd"], ["ab"]),
    (GrammarSpec("choice", '["yes", "né\\"/\\"🎉"]'), ["yes", 'né"/"🎉'], ["no", "yes!"]),
    (GrammarSpec("grammar", 'start: "(" item ")"\nitem: /[a-z}]+/ | start'), ["((a}))"], ["(a"]),
    (GrammarSpec("grammar", 'root ::= "a" | "}" [0-9]'), ["a", "}1"], ["}"]),
    (
        GrammarSpec(
            "structural_tag",
            '{"triggers":["<f"],"structures":[{"begin":"<f=a>","schema":{"type":"null"},"end":"</f>"}]}',
        ),
        ["", "free", "x<f=a>null</f>y"],
        ["<f=a>1</f>"],
    ),
]


@pytest.mark.parametrize(("answer", "good", "bad"), NESTED)
def test_any_grammar_may_stand_in_another(
    answer: GrammarSpec, good: list[str], bad: list[str]
) -> None:
    tokenizer = make_tokenizer(TOKENIZER.to_str(), VOCAB_SIZE, [EOS])
    for spec, before in (
        (answer, ""),
        (GrammarSpec.nested('start: ("#" | "-") answer | "call"', answer), "#"),
    ):
        matcher = compile_grammar(tokenizer, spec)
        for text in good + bad:
            ids = TOKENIZER.encode(before + text).ids
            one = matcher.deep_copy()
            read = one.try_consume_tokens(ids) == len(ids) and one.is_accepting()
            assert read == (text in good), (spec, text)
    assert matcher.validate_tokens(TOKENIZER.encode("call").ids) == len(
        TOKENIZER.encode("call").ids
    )
    with pytest.raises(GrammarCompileError, match="nested again"):
        compile_grammar(tokenizer, GrammarSpec.nested("start: answer", spec))
