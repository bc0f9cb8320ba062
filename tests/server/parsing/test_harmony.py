"""The harmony format: texts cut anywhere, answers over HTTP, and forced calls."""

from __future__ import annotations

import json
import random
import time
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.errors import ConfigurationError
from quire.server.parsing.answer_parser import Tools
from quire.server.parsing.formats.harmony import (
    ASSISTANT,
    CONTROL_TOKENS,
    FINAL,
    MAX_HEADER,
    HarmonyParser,
)
from quire.server.parsing.formats.message_format import MessageFormat
from quire.server.parsing.message_events import ToolCallArguments, ToolCallStart
from quire.server.parsing.message_parser import MessageParser
from quire.server.settings import load_settings
from quire.server.text.tokenizer import Tokenizer

from ..api.test_forced_calls import OTHER, accepts, forced_grammar
from ..api.test_tool_calls import TOOL, chat
from ..conftest import app_client, make_app
from ..fakes import FakeEngineClient, Script, byte_tokenizer, prompt_text
from ..openai_http import CHAT, HI, stream
from .pieces import NASTY, TOOLS, WEATHER, calls_of, cut, read


class Sample(NamedTuple):
    """A text and the message that it gives."""

    text: str
    reasoning: str = ""
    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    prompt_end: str = ASSISTANT


def message(channel: str, text: str, header: str = "", end: str = "<|end|>") -> str:
    return f"<|channel|>{channel}{header}<|message|>{text}{end}"


def call(name: str, arguments: str, end: str = "<|call|>") -> str:
    return message("commentary", arguments, f" to=functions.{name} <|constrain|>json", end)


WHY = message("analysis", "Why?\nBecause a < b.")
SAMPLES = [
    Sample(""),
    Sample("Just text. <| <|mess <b>", "", "Just text. <| <|mess <b>"),
    Sample("  spaces \n\n around \n", "", "  spaces \n\n around \n"),
    Sample(message("final", " 2.\n", end=""), "", " 2.\n"),
    Sample(message("final", "2.", end="<|return|>"), "", "2."),
    Sample(WHY + ASSISTANT + message("final", "So."), "Why?\nBecause a < b.", "So."),
    Sample(WHY + "\n" + ASSISTANT + message("final", "So.") + "\n", "Why?\nBecause a < b.", "So."),
    Sample(WHY + message("final", "So."), "Why?\nBecause a < b.", "So."),  # without a start token
    Sample(
        message("analysis", "One.") + ASSISTANT + message("analysis", "Two."), "One.\nTwo.", ""
    ),
    Sample(message("analysis", "One.", end="") + ASSISTANT + message("final", "1"), "One.", "1"),
    Sample(
        message("commentary", "Let me see.") + ASSISTANT + call("f", "{}"),
        "",
        "Let me see.",
        (("f", "{}"),),
    ),
    Sample(
        WHY + ASSISTANT + call("get_weather", WEATHER),
        "Why?\nBecause a < b.",
        "",
        (("get_weather", WEATHER),),
    ),
    Sample(call("f", NASTY, ""), "", "", (("f", NASTY),)),
    Sample(
        call("f", '{"a": 1}', "<|end|>") + ASSISTANT + call("unknown", '{"a": 2}'),
        "",
        "",
        (("f", '{"a": 1}'), ("unknown", '{"a": 2}')),
    ),
    # the recipient beside the role, and other ways to write a call
    Sample(
        WHY + ASSISTANT + ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        "Why?\nBecause a < b.",
        "",
        (("f", '{"a": 1}'),),
    ),
    Sample(" to=functions.f<|channel|>commentary<|message|>{}<|call|>", "", "", (("f", "{}"),)),
    Sample(
        "<|channel|>analysis to=functions.f code<|message|>\n{}<|call|>", "", "", (("f", "{}"),)
    ),
    Sample("<|channel|>commentary to=f json<|message|>{}", "", "", (("f", "{}"),)),
    Sample("<|channel|>commentary to=functions.f<|message|><|call|>", "", "", (("f", "{}"),)),
    Sample("<|channel|>commentary to=functions.f<|message|> ", "", "", (("f", "{}"),)),
    # bodies that are not calls
    Sample(call("f", "[1]"), "", "[1]"),
    Sample(call("<bad>", "{}"), "", "{}"),
    Sample(message("commentary", "print(1)", " to=python code"), "", "print(1)"),
    Sample(message("analysis", "print(1)", " to=python code"), "print(1)"),
    Sample(call("f", '{"a": 1} and more'), "", "and more", (("f", '{"a": 1}'),)),
    Sample(call("f", '{"a": tru<|end|>') + message("final", "x"), "", "x", (("f", '{"a": tru'),)),
    # headers that break off or never end
    Sample(WHY + "<|start|>assistant<|channel|>fin", "Why?\nBecause a < b."),
    Sample(" to=functions.f"),
    Sample("<|channel|>" + "x" * (MAX_HEADER + 1), "", "x" * (MAX_HEADER + 1)),
    Sample("<|channel|>" + "x" * MAX_HEADER + "<|message|>y", "", "y"),
    Sample(message("final", "a<|message|>b<|return|><|return|>"), "", "a\nb"),
    # answers that begin inside a message
    Sample("2.<|return|>", "", "2.", prompt_end=ASSISTANT + FINAL),
    Sample(" it.<|end|>" + ASSISTANT + message("final", "x"), " it.", "x",
           prompt_end=ASSISTANT + "<|channel|>analysis<|message|>Do"),
    Sample(message("final", "x"), "", "x", prompt_end="hi<|end|>" + ASSISTANT),
    Sample(ASSISTANT + message("final", "x"), "", "x",
           prompt_end="<|start|>user<|message|>hi<|end|>"),
    Sample(ASSISTANT + message("final", "x"), "", "x",
           prompt_end=ASSISTANT + call("f", "{}") + "<|start|>functions.f<|message|>1<|end|>"),
]  # fmt: skip


def parse(*pieces: str, prompt_end: str = ASSISTANT, tools: Tools = TOOLS) -> Any:
    parser = HarmonyParser(tools, prompt_end=prompt_end)
    message = read(MessageParser(parser), list(pieces))
    for made in message.get("tool_calls", ()):
        made["id"] = ""  # call ids are random, and messages are compared
    return message


def assert_same_however_cut(text: str, prompt_end: str, rng: random.Random, times: int) -> None:
    whole = parse(text, prompt_end=prompt_end)
    assert parse(*text, prompt_end=prompt_end) == whole
    for _ in range(times):
        assert parse(*cut(text, rng), prompt_end=prompt_end) == whole


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.text[:50])
def test_samples(sample: Sample) -> None:
    read_back = parse(sample.text, prompt_end=sample.prompt_end)
    assert read_back.get("reasoning", "") == sample.reasoning
    assert (read_back["content"] or "") == sample.content
    assert calls_of(read_back) == list(sample.calls)
    rng = random.Random(sample.text)
    for length in range(len(sample.text) + 1):
        assert_same_however_cut(sample.text[:length], sample.prompt_end, rng, 2)


FRAGMENTS = st.sampled_from(
    [*CONTROL_TOKENS, "assistant", "analysis", "final", "commentary", " to=functions.f", "to=f",
     "json", '{"a": "b"}', "{", "}", '"', " ", "\n", "<", "<|", "|>", "text", "é🎉"]
)  # fmt: skip


@settings(max_examples=500)
@given(st.lists(FRAGMENTS, max_size=20), st.randoms())
def test_any_text_parses_the_same_however_it_is_cut(
    fragments: list[str], rng: random.Random
) -> None:
    assert_same_however_cut("".join(fragments), ASSISTANT, rng, 3)


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers()), st.randoms())
def test_any_arguments_are_returned_unchanged(
    arguments: dict[str, Any], rng: random.Random
) -> None:
    text = json.dumps(arguments, ensure_ascii=False)
    [read_back] = parse(*cut(call("f", text), rng))["tool_calls"]
    assert read_back["function"] == {"name": "f", "arguments": text}


def test_no_call_is_parsed_without_tools() -> None:
    text = WHY + ASSISTANT + call("f", "{}")
    whole = parse(text, tools={})
    assert whole["content"] == "{}" and "tool_calls" not in whole


def test_parts_that_were_not_requested_are_left_out() -> None:
    text = WHY + ASSISTANT + message("final", "So.")
    parser = MessageParser(HarmonyParser({}, prompt_end=ASSISTANT), show_reasoning=False)
    assert read(parser, [text])["content"] == "So." and "reasoning" not in read(parser, [])
    parser = MessageParser(HarmonyParser({}, prompt_end=ASSISTANT, reasons=False))
    assert read(parser, [text])["content"] == "Why?\nBecause a < b.\nSo."


def test_nothing_is_held_back_for_longer_than_needed() -> None:
    parser = HarmonyParser(TOOLS, prompt_end=ASSISTANT)
    assert parser.feed("<|channel|>analysis<|message|>") == []
    for piece in ("Why", " \n", "a <", "b", "<| >"):
        assert "".join(str(event[0]) for event in parser.feed(piece)) in (piece, "a ", "<b")
    assert parser.feed("<|end|><|start|>assistant") == []
    assert parser.feed("<|channel|>commentary to=functions.f <|constrain|>json<|message|>") == []
    start, arguments = parser.feed('{"a')
    assert isinstance(start, ToolCallStart) and start.name == "f"
    assert arguments == ToolCallArguments(0, '{"a')


@pytest.mark.parametrize(
    "text",
    ["<|channel|>" * 8_000, "<|start|>" + "x" * 60_000, " " * 60_000, "<" * 60_000,
     '<|channel|>commentary to=functions.f<|message|>{"a": "' * 2_000, FINAL + "a <|" * 20_000],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_hostile_text_takes_linear_time(text: str) -> None:
    began = time.process_time()
    parse(*(text[at : at + 4] for at in range(0, len(text), 4)))
    assert time.process_time() - began < 5


# -- over HTTP -------------------------------------------------------------------------------

TEMPLATE = """
{%- macro system() -%}
  {%- if reasoning_effort is not defined %}{% set reasoning_effort = "medium" %}{% endif -%}
  {{- "Reasoning: " + reasoning_effort }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" + system() + "<|end|>" }}
{%- if tools %}
  {{- "<|start|>developer<|message|>" + tools|tojson + tools[0].function.description + "<|end|>" }}
{%- endif %}
{%- for message in messages -%}
  {%- if message.tool_calls %}
    {%- if message.content and message.thinking %}{{ raise_exception("both") }}{% endif %}
    {%- if message.thinking %}
      {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
    {%- endif %}
    {%- for call in message.tool_calls %}
      {{- "<|start|>assistant to=functions." + call.function.name }}
      {{- "<|channel|>commentary json<|message|>" + call.function.arguments|tojson + "<|call|>" }}
    {%- endfor %}
  {%- elif message.role == "assistant" %}
    {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
  {%- else %}
    {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
  {%- endif %}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif -%}
"""
ARGUMENTS = '{"city": "Zürich 🎉"}'
ANSWER = (
    WHY + ASSISTANT + message("commentary", "Let me see.") + ASSISTANT + call("weather", ARGUMENTS)
)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return byte_tokenizer(TEMPLATE, (*CONTROL_TOKENS, "<|endoftext|>"))


@pytest.fixture
def client(engine: FakeEngineClient, tokenizer: Tokenizer) -> httpx.AsyncClient:
    engine.vocab_size = tokenizer.vocab_size
    return app_client(make_app(engine, tokenizer))


def answers(engine: FakeEngineClient, tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.backend.encode(text).ids
    assert set(tokenizer.special_ids.values()) & set(tokens)
    engine.scripts = lambda request, choice: Script(tokens, "stop")


async def test_answers_are_the_same_whole_and_streamed(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    answers(engine, tokenizer, ANSWER)
    choice = await chat(client, tools=[TOOL])
    assert prompt_text(engine, tokenizer).endswith("hi<|end|><|start|>assistant")
    whole = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert whole["reasoning"] == whole["reasoning_content"] == "Why?\nBecause a < b."
    assert whole["content"] == "Let me see."
    [made] = whole["tool_calls"]
    assert made["function"] == {"name": "weather", "arguments": ARGUMENTS}
    chunks = await stream(client, CHAT, **HI, tools=[TOOL])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    for name in ("content", "reasoning"):
        assert "".join(delta.get(name, "") for delta in deltas) == whole[name]
    streamed = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert streamed[0]["function"]["name"] == "weather"
    assert "".join(part["function"]["arguments"] for part in streamed) == ARGUMENTS
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    answers(engine, tokenizer, message("final", "Hi.<|endoftext|>"))
    assert (await chat(client))["message"]["content"] == "Hi."


async def test_settings_reach_the_template(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    answers(engine, tokenizer, message("final", "Hi."))
    await chat(client, reasoning_effort="high")
    assert "Reasoning: high<|end|>" in prompt_text(engine, tokenizer)
    await chat(client)
    assert "Reasoning: medium<|end|>" in prompt_text(engine, tokenizer)


async def test_earlier_reasoning_and_calls_reach_the_template(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    answers(engine, tokenizer, ANSWER)
    earlier = (await chat(client, tools=[TOOL]))["message"]
    result = {"role": "tool", "tool_call_id": earlier["tool_calls"][0]["id"], "content": "9"}
    user = HI["messages"][0]
    # The template refuses both content and reasoning in a message with a call, so the reasoning
    # is dropped.
    await chat(client, tools=[TOOL], messages=[user, earlier, result])
    text = prompt_text(engine, tokenizer)
    assert "analysis" not in text and "to=functions.weather<|channel|>commentary json" in text
    await chat(client, tools=[TOOL], messages=[user, {**earlier, "content": None}, result])
    assert "<|channel|>analysis<|message|>Why?" in prompt_text(engine, tokenizer)


async def test_an_answer_that_is_continued(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    answers(engine, tokenizer, " is 2.<|end|>")
    begun = {"role": "assistant", "content": "I think that the sum of one and one"}
    fields = {"messages": [*HI["messages"], begun], "continue_final_message": True}
    assert (await chat(client, **fields))["message"]["content"] == " is 2."


# -- forced calls ----------------------------------------------------------------------------


@pytest.mark.parametrize("special", [(), CONTROL_TOKENS], ids=["text", "control tokens"])
async def test_forced_calls(engine: FakeEngineClient, special: tuple[str, ...]) -> None:
    tokenizer = byte_tokenizer(TEMPLATE, special)
    ok = call("weather", '{"city": "Ulm"}', "")
    grammar = await forced_grammar(engine, tokenizer, "openai", tool_choice="required")
    for text in (ok, call("other", "{}", ""), WHY + ASSISTANT + ok):
        assert accepts(tokenizer, grammar, text)
    wrong = [
        "It rains.",
        message("final", "It rains."),
        WHY + ok,
        WHY + ASSISTANT + message("final", "So."),
        call("weather", '{"city": 1}', ""),
        call("weathers", '{"city": "Ulm"}', ""),
        ok + "<|end|>" + ASSISTANT + ok,
    ]
    assert not any(accepts(tokenizer, grammar, text) for text in wrong)
    named = {"type": "function", "function": {"name": "weather"}}
    grammar = await forced_grammar(engine, tokenizer, "openai", tool_choice=named)
    assert accepts(tokenizer, grammar, ok)
    assert not accepts(tokenizer, grammar, call("other", "{}", ""))
    begun = {"role": "assistant", "content": "I think that"}
    fields = {"messages": [*HI["messages"], begun], "continue_final_message": True}
    grammar = await forced_grammar(engine, tokenizer, "openai", tool_choice=named, **fields)
    assert accepts(tokenizer, grammar, "<|end|>" + ASSISTANT + ok)
    format = MessageFormat("openai", "openai_gptoss")
    parser = format.parser(
        {"weather": {}}, prompt_end="", continued="x", show_reasoning=True, parallel_calls=True
    )
    [made] = read(parser, ["<|end|>" + ASSISTANT + ok])["tool_calls"]
    assert made["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert OTHER["function"]["name"] == "other"


# -- choosing the format ---------------------------------------------------------------------


def test_the_flags_choose_the_format() -> None:
    def format(**flags: Any) -> tuple[str | None, str | None]:
        made = MessageFormat.of(load_settings(**flags), TEMPLATE)
        return made.tool_format, made.reasoning

    assert format() == ("openai", "openai_gptoss")
    both = {"tool_call_parser": "harmony", "reasoning_parser": "harmony"}
    assert format(**both) == ("openai", "openai_gptoss")
    assert format(tool_call_parser="none") == (None, "openai_gptoss")
    assert format(reasoning_parser="none") == ("openai", None)
    for wrong in ({"tool_call_parser": "hermes"}, {"reasoning_parser": "qwen3"}):
        with pytest.raises(ConfigurationError, match="harmony is one format"):
            format(**wrong)
