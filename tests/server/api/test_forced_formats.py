"""Calls that `tool_choice` forces in each format: what its grammar accepts is what models write,
and the parser reads it back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quire.engine.grammar.compile import compile_grammar, make_tokenizer
from quire.server.parsing.formats.message_format import MessageFormat
from quire.server.parsing.formats.tool_formats import TOOL_FORMATS
from quire.server.parsing.reasoning import ReasoningStyle, tags_of
from quire.server.requests.forced_calls import chat_grammar
from quire.server.requests.protocol import ChatBody, validate
from quire.server.text.tokenizer import Tokenizer

from ..conftest import MakeClient
from ..fakes import CHAT_TEMPLATE, IM_END, byte_tokenizer
from ..openai_http import CHAT, HI
from ..parsing.pieces import TOOLS, calls_of, read
from ..parsing.samples import json_formats, parameter_formats, python_formats
from ..parsing.samples.sample import ODD, FormatSamples
from .test_tool_calls import refusal

SAMPLES = (*json_formats.SAMPLES, *parameter_formats.SAMPLES, *python_formats.SAMPLES)
TEMPLATES = {"mistral": "{# [ARGS] #}", "pythonic": "{# <|python_start|> #}"}
"""What the chat template has of a format that has several shapes."""
OFFERED = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in TOOLS.items()
]
TAGS = ["x", "y z"]
PLACE = {"name": "Ulm", "at": [1, {"deep": None}]}
GOOD: list[list[tuple[str, dict[str, Any]]]] = [
    [("note", {"text": "so"})],
    [("note", {"text": ODD})],
    [("note", {"text": "a\nb", "level": 3, "ratio": -0.5, "urgent": True, "place": PLACE})],
    [("note", {"text": "", "level": None, "tags": TAGS, "kind": "to do"})],
    [("note", {"text": "x", "kind": "done"}), ("get_weather", {}), ("get_weather", {"city": "Y"})],
]
BAD: list[list[tuple[str, dict[str, Any]]]] = [
    [("note", {})],
    [("note", {"level": 3})],
    [("note", {"text": "x", "level": [1]})],
    [("note", {"text": "x", "urgent": 1})],
    [("note", {"text": "x", "kind": "never"})],
    [("unknown", {})],
]


def written(samples: FormatSamples, calls: list[tuple[str, dict[str, Any]]]) -> str:
    if samples.format in ("pythonic", "gemma3", "olmo3", "lfm2"):
        return samples.frame([in_python(*call) for call in calls])
    text = samples.frame([samples.call(*call) for call in calls]).removeprefix("<|python_tag|>")
    if quote := {"functiongemma": "<escape>", "gemma4": '<|"|>'}.get(samples.format):
        for value in (PLACE, TAGS):  # the grammar has lists and objects within arguments as JSON
            text = text.replace(parameter_formats.gemma_value(value, quote), json.dumps(value))
    return text


def in_python(name: str, arguments: dict[str, Any]) -> str:
    """Write a call with strings as in JSON, as the grammar wants them."""
    parts = [
        f"{key}={value if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)}"
        for key, value in arguments.items()
    ]
    return f"{name}({', '.join(parts)})"


class Grammar:
    """The grammar of a forced call in some format, ready to try texts with."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        format: str,
        *,
        style: ReasoningStyle = "qwen3",
        **fields: Any,
    ) -> None:
        body, _ = validate(
            ChatBody, {**HI, "tools": OFFERED, "tool_choice": "required", **fields}, strict=True
        )
        constraint = chat_grammar(body, None, [], tokenizer, MessageFormat(format, style))
        assert constraint is not None
        vocabulary = make_tokenizer(tokenizer.backend.to_str(), tokenizer.vocab_size, [IM_END])
        self._matcher = compile_grammar(vocabulary, constraint.spec)
        self._encode = tokenizer.backend.encode

    def accepts(self, text: str) -> bool:
        matcher = self._matcher.deep_copy()
        token_ids = self._encode(text).ids
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.mark.parametrize("special", [False, True], ids=["text", "control tokens"])
@pytest.mark.parametrize("samples", SAMPLES, ids=lambda samples: samples.format)
def test_the_grammar_and_the_parser_agree(samples: FormatSamples, special: bool) -> None:
    format = samples.format
    tokens = TOOL_FORMATS[format].parser.control_tokens if special else ()
    tokenizer = byte_tokenizer(CHAT_TEMPLATE + TEMPLATES.get(format, ""), tokens)
    grammar = Grammar(tokenizer, format)
    for calls in GOOD:
        text = written(samples, calls)
        assert grammar.accepts(text), text
        assert grammar.accepts("<think>\nWhy < not?\n</think>\n\n" + text), text
        parser = MessageFormat(format, None).parser(
            TOOLS, prompt_end="", continued=None, show_reasoning=True, parallel_calls=True
        )
        message = read(parser, [text])
        read_back = [(name, json.loads(text)) for name, text in calls_of(message)]
        assert (message["content"], read_back) == (None, calls)
    for calls in BAD:
        text = written(samples, calls)
        assert not grammar.accepts(text), text
    assert not grammar.accepts("It rains.")
    assert not grammar.accepts("Yes. " + written(samples, GOOD[0]))
    # Without parallel calls there is exactly one, and a name allows one tool.
    grammar = Grammar(tokenizer, format, parallel_tool_calls=False)
    assert grammar.accepts(written(samples, GOOD[0]))
    assert not grammar.accepts(written(samples, GOOD[-1]))
    named = {"type": "function", "function": {"name": "f"}}
    grammar = Grammar(tokenizer, format, tool_choice=named)
    assert grammar.accepts(written(samples, [("f", {})]))
    assert not grammar.accepts(written(samples, GOOD[0]))


@pytest.mark.parametrize("special", [False, True], ids=["text", "control tokens"])
@pytest.mark.parametrize("style", ["mistral", "seed_oss", "cohere_command3", "gemma4"])
def test_reasoning_before_forced_calls_is_in_the_models_style(
    style: ReasoningStyle, special: bool
) -> None:
    format = MessageFormat("mistral", style)
    tokens = format.control_tokens(with_tools=True) if special else ()
    tokenizer = byte_tokenizer(CHAT_TEMPLATE + "{# [ARGS] #}", tokens)
    grammar = Grammar(tokenizer, "mistral", style=style)
    opening, closing, _ = tags_of(style)
    call = "[TOOL_CALLS]f[ARGS]{}"
    assert grammar.accepts(f"{opening}\nWhy?\n{closing}\n{call}")
    assert grammar.accepts(call)
    assert not grammar.accepts(f"<think>Why?</think>{call}")


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "x+"}}}, "'pattern' of 'a'"),
        ({"properties": {"a": {"type": "string", "maxLength": 3}}}, "'maxLength' of 'a'"),
        ({"properties": {"a b": {"type": "string"}}}, "the name 'a b'"),
        ({"anyOf": [{"required": ["a"]}]}, "'anyOf'"),
        ({"required": [1]}, "a wrong 'required'"),
    ],
)
async def test_what_parameters_by_themselves_cannot_enforce_is_refused(
    make_client: MakeClient, schema: dict[str, Any], what: str
) -> None:
    client = make_client(tool_call_parser="qwen3_coder")
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    param, message = await refusal(client, tools=[tool], tool_choice="required")
    assert param == "tool_choice" and what in message
    # It is fine if nothing has to be enforced, or if arguments are JSON.
    assert (await client.post(CHAT, json={**HI, "tools": [tool]})).status_code == 200
