"""A request's grammar in llguidance's terms: how it is compiled, and for which tokens.

llguidance is imported where it is used, so that the engine runs without it; a constrained
request is refused there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig
from ..errors import one_line
from ..request import GrammarSpec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

_WHITESPACE = r"(\n {0,32}| )?"
"""Between the tokens of JSON: nothing, a space, or a line break and its indentation. Never more,
lest a model write whitespace until its tokens are used up."""

JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": _WHITESPACE, "lenient": False}
"""Not lenient: a keyword that cannot be enforced is refused, not skipped."""


class GrammarCompileError(ValueError):
    """The grammar is wrong, too complex, or met by nothing; the message is one line."""


def is_available() -> bool:
    return find_spec("llguidance") is not None


def read_tokenizer_json(config: EngineConfig) -> str:
    """The text of the model's tokenizer.json, with the tokens that other files add to it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        config.model, trust_remote_code=config.trust_remote_code
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise GrammarCompileError(f"{type(tokenizer).__name__} is not a fast tokenizer")
    backend.no_truncation()
    backend.no_padding()
    text: str = backend.to_str()
    return text


def make_tokenizer(
    tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]
) -> LLTokenizer:
    """The tokens that a grammar is matched by, from the text of a tokenizer.json.

    `vocab_size` is the logits' width; ids beyond the tokenizer's are never allowed. Raises
    GrammarCompileError for a tokenizer whose tokens' bytes llguidance cannot tell.
    """
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

    ids = Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True).values()
    size = max(vocab_size, max(ids) + 1)
    try:
        return LLTokenizer(tokenizer_json, n_vocab=size, eos_token=list(eos_token_ids))
    except ValueError as error:
        raise GrammarCompileError(
            f"this model's tokenizer cannot be constrained: {one_line(str(error))}"
        ) from error


def compile_grammar(tokenizer: LLTokenizer, spec: GrammarSpec) -> LLMatcher:
    """A matcher at its beginning, its first mask computed once; copy it for each sequence.

    Takes milliseconds, or without bound for what is made to (`multipleOf: 99999999`): the HTTP
    side compiles every grammar once in a process that it can kill. Raises GrammarCompileError.
    """
    from llguidance import LLMatcher, LLParserLimits

    try:
        grammar = _translate(spec)
    except ValueError as error:
        raise GrammarCompileError(one_line(str(error))) from error
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    failure = matcher_failure(matcher)
    if failure is not None:
        raise GrammarCompileError(failure)
    return matcher


def matcher_failure(matcher: LLMatcher) -> str | None:
    """Why a matcher cannot go on, in one line; None where it can, or is at its end."""
    error = matcher.get_error()
    dead_end = not error and matcher.is_stopped() and not matcher.is_accepting()
    if dead_end or error.startswith("NoExtension"):
        return "nothing can continue it"
    return one_line(error) or None


def _translate(spec: GrammarSpec) -> str:
    """llguidance's own form of a grammar. Raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    match spec.kind:
        case "json":
            return LLMatcher.grammar_from_json_schema(spec.text, overrides=JSON_OPTIONS)
        case "regex":
            return LLMatcher.grammar_from_regex(spec.text)
        case "choice":
            return grammar_from("choice", spec.text)
        case "grammar":
            return grammar_from("grammar", spec.text)
        case "structural_tag":
            return LLMatcher.grammar_from_lark(_tags_to_lark(json.loads(spec.text)))


def _tags_to_lark(tags: Mapping[str, Any]) -> str:
    """Free text in which each trigger begins one of the structures that start with it.

    `{"triggers": [str], "structures": [{"begin", "schema", "end"}]}`. A trigger ends the free
    text as soon as it is written; then the rest of a structure's `begin` must follow, a value of
    its schema, and its `end`.
    """
    rules = ["start: (" + " | ".join(f"tag_{i}" for i in range(len(tags["triggers"]))) + ")* tail"]
    rules.append(r"tail: /(.|\n)*/")
    for number, trigger in enumerate(tags["triggers"]):
        bodies = []
        for structure in tags["structures"]:
            if structure["begin"].startswith(trigger):
                schema = {**structure["schema"], "x-guidance": JSON_OPTIONS}
                rest = _literal(structure["begin"][len(trigger) :])
                bodies.append(f"{rest} %json {json.dumps(schema)} {_literal(structure['end'])}")
        rules.append(f"tag_{number}: trigger_{number} ({' | '.join(bodies)})")
        rules.append(rf"trigger_{number}[lazy]: /(.|\n)*/ {_literal(trigger)}")
    return "\n".join(rules)


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""
