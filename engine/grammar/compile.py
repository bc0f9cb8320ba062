"""Compile a request's grammar with llguidance, for the tokens of the model.

llguidance is imported only where it is used, so that the engine also runs without it; such an
engine refuses constrained requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig
from ..errors import one_line
from ..request import GrammarSpec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    # Not public in llguidance; check it at an upgrade. It only serves the type checker.
    from llguidance._lib import JsonCompileOptions

_NO_EXTENSION = "NoExtension"
"""How LLMatcher.get_error() begins if no token can continue the grammar. llguidance does not
document its error texts; check this at an upgrade, too."""

_WHITESPACE = r"(\n {0,32}| )?"
"""What may stand between the tokens of JSON: nothing, a space, or a line break and indentation. If
more were allowed, a model could write whitespace until it reaches max_tokens."""

JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": _WHITESPACE, "lenient": False}
"""llguidance's options for JSON schemas. Without `lenient` it refuses a schema with a keyword that
it cannot enforce; otherwise it would ignore the keyword."""


class GrammarCompileError(ValueError):
    """The grammar is wrong or too complex, or nothing matches it. The message is one line."""


def is_available() -> bool:
    """Return True if llguidance is installed."""
    return find_spec("llguidance") is not None


def with_json_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON schema that carries JSON_OPTIONS, to stand inside a Lark grammar."""
    return {**schema, "x-guidance": JSON_OPTIONS}


def read_tokenizer_json(config: EngineConfig) -> str:
    """Return the text of the model's tokenizer.json, with the tokens that other files add."""
    from transformers import AutoTokenizer

    from ..checkpoints.gguf_tokenizer import tokenizer_folder

    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_folder(config.model, config.gguf_file), trust_remote_code=config.trust_remote_code
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
    """Build llguidance's tokenizer from the text of a tokenizer.json.

    `vocab_size` is the width of the logits; token ids that the tokenizer lacks are never allowed.
    Raises GrammarCompileError if llguidance cannot tell the bytes of the tokens.
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
    """Return a matcher at the start of the grammar; copy it for each sequence.

    Its first mask has been computed, so that failures show here. This usually takes milliseconds,
    but hostile grammars (`multipleOf: 99999999`) take unlimited time: therefore the HTTP process
    first compiles every grammar in a process that it can kill. Raises GrammarCompileError.
    """
    from llguidance import LLMatcher, LLParserLimits

    try:
        grammar = _translate(spec)
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # JSON of another form
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
    """Return in one line why a matcher cannot go on; None if it can, or is at its end."""
    error = matcher.get_error()
    dead_end = not error and matcher.is_stopped() and not matcher.is_accepting()
    if dead_end or error.startswith(_NO_EXTENSION):
        return "nothing can continue it"
    return one_line(error) or None


def _translate(spec: GrammarSpec) -> str:
    """Return the grammar in llguidance's own form. Raises ValueError."""
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
        case "nested":
            parts = json.loads(spec.text)
            answer = _as_lark(GrammarSpec(parts["kind"], parts["text"]))
            return LLMatcher.grammar_from_lark(f"{parts['rules']}\nanswer: {answer}\n")


def _as_lark(spec: GrammarSpec) -> str:
    """Return a grammar as Lark that can stand in a rule of another grammar. Raises ValueError."""
    match spec.kind:
        case "json":
            return f"%json {json.dumps(with_json_options(json.loads(spec.text)))}"
        case "regex":
            # A slash would end the expression, and a line break is not allowed in one.
            pattern = re.sub(
                r"(\\.)|/", lambda found: found[1] or r"\/", spec.text, flags=re.DOTALL
            )
            return "/" + pattern.replace("\\\n", r"\n").replace("\n", r"\n") + "/"
        case "choice":
            return " | ".join(map(_literal, json.loads(spec.text)))
        case "structural_tag" | "grammar":
            return "%lark {\n" + _translate(spec) + "\n}"  # llguidance's own form of Lark is Lark
        case "nested":
            raise ValueError("a nested grammar cannot be nested again")


def _tags_to_lark(tags: Mapping[str, Any]) -> str:
    """Return a Lark grammar for free text in which triggers begin structures.

    `tags` is `{"triggers": [str], "structures": [{"begin", "schema", "end"}]}`. The free text ends
    as soon as a trigger has been written. Then one of the structures whose `begin` starts with the
    trigger must follow: the rest of its `begin`, a JSON value of its schema, and its `end`.
    """
    rules = ["start: (" + " | ".join(f"tag_{i}" for i in range(len(tags["triggers"]))) + ")* tail"]
    rules.append(r"tail: /(.|\n)*/")
    for number, trigger in enumerate(tags["triggers"]):
        bodies = []
        for structure in tags["structures"]:
            if structure["begin"].startswith(trigger):
                schema = with_json_options(structure["schema"])
                rest = _literal(structure["begin"][len(trigger) :])
                bodies.append(f"{rest} %json {json.dumps(schema)} {_literal(structure['end'])}")
        rules.append(f"tag_{number}: trigger_{number} ({' | '.join(bodies)})")
        rules.append(rf"trigger_{number}[lazy]: /(.|\n)*/ {_literal(trigger)}")
    return "\n".join(rules)


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""
