"""Calls that `tool_choice` forces: the grammar that the engine gets, in every format of calls."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from quire.engine.grammar.compile import compile_grammar, make_tokenizer
from quire.engine.request import GrammarSpec
from quire.server.parsing.formats.message_format import MessageFormat
from quire.server.parsing.message_events import MessageBuilder
from quire.server.text.tokenizer import Tokenizer

from ..conftest import MakeClient, app_client, make_app
from ..fakes import CHAT_TEMPLATE, IM_END, FakeEngineClient, byte_tokenizer, say
from ..openai_http import CHAT, HI
from .test_tool_calls import ARGUMENTS, CALL, TOOL, chat, refusal

OTHER = {"type": "function", "function": {"name": "other"}}
OK = '{"city": "Ulm"}'
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
V31_CALL = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
V3_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
HERMES_CALL = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
OBJECT = '{{"name": "{}", "arguments": {}}}'
FORMATS = [
    ("hermes", "", HERMES_CALL, "{}", "\n"),
    ("llama3_json", "", '{{"name": "{}", "parameters": {}}}', "{}", "; "),
    ("mistral", "", OBJECT, "[TOOL_CALLS][{}]", ", "),
    ("mistral", "{# [ARGS] #}", "[TOOL_CALLS]{}[ARGS]{}", "{}", ""),
    ("deepseek_v3", "{# ```json #}", V3_CALL, BEGIN + "{}" + END, "\n"),
    ("deepseek_v3", "", V31_CALL, BEGIN + "{}" + END, ""),
]
CONTROL_TOKENS = ("[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>", BEGIN, "</think>")


def accepts(tokenizer: Tokenizer, spec: GrammarSpec, text: str) -> bool:
    """Decide whether the engine's matcher lets a model write `text` and end there."""
    vocabulary = make_tokenizer(tokenizer.backend.to_str(), tokenizer.vocab_size, [IM_END])
    matcher = compile_grammar(vocabulary, spec)
    token_ids = tokenizer.backend.encode(text).ids
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


async def forced_grammar(
    engine: FakeEngineClient, tokenizer: Tokenizer, format: str, **fields: Any
) -> GrammarSpec:
    engine.vocab_size = tokenizer.vocab_size
    app = make_app(engine, tokenizer, tool_call_parser=format)
    async with app_client(app) as client:
        await chat(client, tools=[TOOL, OTHER], **fields)
    grammar = engine.requests[-1].grammar
    assert grammar is not None
    return grammar


@pytest.mark.parametrize("special", [(), CONTROL_TOKENS], ids=["text", "control tokens"])
@pytest.mark.parametrize(("format", "template", "call", "frame", "separator"), FORMATS)
async def test_a_forced_call_is_in_the_models_format(
    engine: FakeEngineClient,
    special: tuple[str, ...],
    format: str,
    template: str,
    call: str,
    frame: str,
    separator: str,
) -> None:
    tokenizer = byte_tokenizer(CHAT_TEMPLATE + template, special)
    one = frame.format(call.format("weather", OK))
    two = frame.format(call.format("weather", OK) + separator + call.format("other", "{}"))
    wrong = [
        "It rains.",
        "It rains. " + one,
        frame.format(call.format("weather", '{"city": 1}')),
        frame.format(call.format("weather", "{}")),
        frame.format(call.format("weathers", OK)),
        one + " So.",
    ]
    grammar = await forced_grammar(engine, tokenizer, format, tool_choice="required")
    assert accepts(tokenizer, grammar, one) and accepts(tokenizer, grammar, two)
    assert not any(accepts(tokenizer, grammar, text) for text in wrong)
    fields = {"tool_choice": "required", "parallel_tool_calls": False}
    grammar = await forced_grammar(engine, tokenizer, format, **fields)
    assert accepts(tokenizer, grammar, one) and not accepts(tokenizer, grammar, two)
    named = {"type": "function", "function": {"name": "weather"}}
    grammar = await forced_grammar(engine, tokenizer, format, tool_choice=named)
    assert accepts(tokenizer, grammar, one)
    other = frame.format(call.format("other", "{}"))
    assert not accepts(tokenizer, grammar, other)
    # The parser reads what the grammar accepts as calls.
    parser = MessageFormat(format, None).parser(
        {"weather": {}, "other": {}},
        prompt_end="",
        continued=None,
        show_reasoning=True,
        parallel_calls=True,
    )
    builder = MessageBuilder()
    builder.add(parser.feed(two) + parser.finish())
    functions = [call["function"] for call in builder.message()["tool_calls"]]
    assert functions == [
        {"name": "weather", "arguments": OK},
        {"name": "other", "arguments": "{}"},
    ]
    assert builder.content == ""


@pytest.mark.parametrize("special", [(), CONTROL_TOKENS], ids=["text", "control tokens"])
async def test_reasoning_may_precede_a_forced_call(
    engine: FakeEngineClient, special: tuple[str, ...]
) -> None:
    call = HERMES_CALL.format("weather", OK)
    tokenizer = byte_tokenizer(CHAT_TEMPLATE, special)
    grammar = await forced_grammar(engine, tokenizer, "hermes", tool_choice="required")
    assert accepts(tokenizer, grammar, "<think>\nWhy < not?\n</think>\n\n" + call)
    assert accepts(tokenizer, grammar, call)
    assert not accepts(tokenizer, grammar, "Why\n</think>\n\n" + call)
    fields = {"tool_choice": "required", "reasoning_effort": "none"}
    grammar = await forced_grammar(engine, tokenizer, "hermes", **fields)
    assert accepts(tokenizer, grammar, call)
    opened = CHAT_TEMPLATE.removesuffix("{% endif %}") + "<think>\n{% endif %}"
    tokenizer = byte_tokenizer(opened, special)
    grammar = await forced_grammar(engine, tokenizer, "hermes", tool_choice="required")
    assert accepts(tokenizer, grammar, "Why\n</think>\n\n" + call)
    assert not accepts(tokenizer, grammar, call)


async def test_a_forced_call_is_returned(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say(CALL)
    choice = await chat(client, tools=[TOOL], tool_choice="required")
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": ARGUMENTS}
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    response = await client.post(CHAT, json={**HI, "tools": [strict], "tool_choice": "required"})
    assert "x-quire-ignored-params" not in response.headers


async def test_calls_that_cannot_be_forced_are_refused(
    engine: FakeEngineClient, make_client: MakeClient
) -> None:
    client = make_client(tool_call_parser="hermes")
    bad = {"type": "object", "properties": {"a": {"$ref": "http://x/y"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": bad}}
    param, _ = await refusal(client, tools=[tool], tool_choice="required")
    assert param == "tool_choice"
    big = {"type": "object", "description": "x" * 70_000}
    tool = {"type": "function", "function": {"name": "f", "parameters": big}}
    # The schema is also too long for the prompt, but the grammar's error comes first.
    engine.max_model_len = engine.num_blocks = 100_000
    param, message = await refusal(client, tools=[tool], tool_choice="required")
    assert param == "tool_choice" and "65536 bytes" in message
    assert not engine.requests
