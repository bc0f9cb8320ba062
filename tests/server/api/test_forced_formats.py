"""Calls that `tool_choice` forces in each format: what its grammar accepts is what models write,
and the parser reads it back."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from quire.server.parsing.formats.message_format import MessageFormat
from quire.server.parsing.formats.tool_formats import TOOL_FORMATS
from quire.server.text.tokenizer import Tokenizer

from ..conftest import MakeClient, make_app
from ..fakes import CHAT_TEMPLATE, FakeEngineClient, byte_tokenizer
from ..openai_http import CHAT, HI
from ..parsing.pieces import TOOLS, calls_of, read
from ..parsing.samples import json_formats, parameter_formats, python_formats
from ..parsing.samples.sample import ODD, FormatSamples
from .test_forced_calls import accepts
from .test_tool_calls import chat, refusal

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


@pytest.mark.parametrize("special", [False, True], ids=["text", "control tokens"])
@pytest.mark.parametrize("samples", SAMPLES, ids=lambda samples: samples.format)
async def test_the_grammar_and_the_parser_agree(
    engine: FakeEngineClient, samples: FormatSamples, special: bool
) -> None:
    format = samples.format
    tokens = TOOL_FORMATS[format].parser.control_tokens if special else ()
    tokenizer = byte_tokenizer(CHAT_TEMPLATE + TEMPLATES.get(format, ""), tokens)
    grammar = await forced(engine, tokenizer, format)
    for calls in GOOD:
        text = written(samples, calls)
        assert accepts(tokenizer, grammar, text), text
        parser = MessageFormat(format, None).parser(
            TOOLS, prompt_end="", continued=None, show_reasoning=True, parallel_calls=True
        )
        message = read(parser, [text])
        read_back = [(name, json.loads(text)) for name, text in calls_of(message)]
        assert (message["content"], read_back) == (None, calls)
    for calls in BAD:
        text = written(samples, calls)
        assert not accepts(tokenizer, grammar, text), text
    assert not accepts(tokenizer, grammar, "It rains.")
    assert not accepts(tokenizer, grammar, "Yes. " + written(samples, GOOD[0]))
    # Without parallel calls there is exactly one.
    grammar = await forced(engine, tokenizer, format, parallel_tool_calls=False)
    assert accepts(tokenizer, grammar, written(samples, GOOD[0]))
    assert not accepts(tokenizer, grammar, written(samples, GOOD[-1]))


async def forced(engine: FakeEngineClient, tokenizer: Tokenizer, format: str, **fields: Any) -> Any:
    engine.vocab_size = tokenizer.vocab_size
    engine.max_model_len = engine.num_blocks = 8192
    transport = httpx.ASGITransport(app=make_app(engine, tokenizer, tool_call_parser=format))
    async with httpx.AsyncClient(transport=transport, base_url="http://quire") as client:
        await chat(client, tools=OFFERED, tool_choice="required", **fields)
    return engine.requests[-1].grammar


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "x+"}}}, "'pattern' of 'a'"),
        ({"properties": {"a": {"type": "string", "maxLength": 3}}}, "'maxLength' of 'a'"),
        ({"properties": {"a b": {"type": "string"}}}, "the name 'a b'"),
        ({"anyOf": [{"required": ["a"]}]}, "'anyOf'"),
    ],
)
async def test_what_parameters_by_themselves_cannot_enforce_is_refused(
    make_client: MakeClient, engine: FakeEngineClient, schema: dict[str, Any], what: str
) -> None:
    client = make_client(tool_call_parser="qwen3_coder")
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    param, message = await refusal(client, tools=[tool], tool_choice="required")
    assert param == "tool_choice" and what in message
    # It is fine if nothing has to be enforced, or if arguments are JSON.
    assert (await client.post(CHAT, json={**HI, "tools": [tool]})).status_code == 200
