"""Test grammars that do not compile, and tokenizers that cannot be constrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quire.engine.grammar.compile import GrammarCompileError, compile_grammar, make_tokenizer
from quire.engine.request import GrammarSpec

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
