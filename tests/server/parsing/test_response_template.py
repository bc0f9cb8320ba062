"""Answers read by a tokenizer's response template, with transformers' own parser as the oracle."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.errors import ConfigurationError
from quire.server.parsing.formats.message_format import MessageFormat
from quire.server.settings import load_settings
from quire.server.text.tokenizer import Tokenizer

from ..api.test_tool_calls import chat, refusal
from ..conftest import app_client, make_app
from ..fakes import FakeEngineClient, Script, byte_tokenizer, prompt_text
from ..openai_http import CHAT, HI, stream
from .pieces import TOOLS, calls_of, cut, read

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{% endfor %}{% endfor %}{{ tools | tojson if tools }}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "[assistant]",
    "fields": {
        "reasoning_content": {"open": "(muse)", "close": "(/muse)", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*\(do (?P<name>[a-z_]+)\)",
            "close": "(/do)",
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"close": "(end)", "content": "text"},
    },
}
CONTROL_TOKENS = ("(muse)", "(/muse)", "(/do)", "(end)", "(other)")
ONE = '(do note){"text": "Zürich 🎉 (muse)", "level": "3"}(/do)'
SAMPLES = [
    "",
    "Just text.",
    "  spaces \n\n within \n ",
    "(muse) Why?\n\n(/muse)\n\nSo it is.(end)",
    "(muse)Why?(/muse)" + ONE,
    "Let me see.\n" + ONE + ' (do f){"a": [1, {"b": null}]}(/do)(end)',
    "(do f){}(/do)",
    "(muse)never closed",
    "(mu) (do) (do F){}",
]


def new_tokenizer(template: Any = TEMPLATE, chat_template: str = CHAT_TEMPLATE) -> Tokenizer:
    tokenizer = byte_tokenizer(chat_template, CONTROL_TOKENS)
    tokenizer._hf.response_template = template
    return tokenizer


TOKENIZER = new_tokenizer()
FORMAT = MessageFormat.of(load_settings(), CHAT_TEMPLATE, TOKENIZER.response_template)


def parse(*pieces: str, prompt_end: str = "[assistant]", tools: Any = TOOLS) -> Any:
    parser = FORMAT.parser(
        tools, prompt_end=prompt_end, continued=None, show_reasoning=True, parallel_calls=True
    )
    message = read(parser, list(pieces))
    return message.get("reasoning"), message["content"], calls_of(message)


def assert_same_however_cut(text: str, rng: random.Random) -> None:
    whole = parse(text)
    assert parse(*text) == whole
    for _ in range(3):
        assert parse(*cut(text, rng)) == whole


@pytest.mark.parametrize("text", SAMPLES)
def test_answers_are_read_as_transformers_reads_them(text: str) -> None:
    functions = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in TOOLS.items()
    ]
    expected = TOKENIZER._hf.parse_response(text, prefix="[user]hi[assistant]", tools=functions)
    reasoning, content, calls = parse(text)
    assert (reasoning or "") == expected.get("reasoning_content", "")
    assert (content or "") == expected.get("content", "")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        (call["function"]["name"], call["function"]["arguments"])
        for call in expected.get("tool_calls", ())
    ]
    for length in range(len(text) + 1):
        assert_same_however_cut(text[:length], random.Random(text))


def test_what_transformers_cannot_read_is_content() -> None:
    bad = "Well.(do f){'a': 1}(/do) and (muse)so(/muse)"
    assert parse(bad) == (None, "Well.{'a': 1} and (muse)so(/muse)", [])
    assert parse("(do f){}(/do)(do f)[1]") == (None, "[1]", [("f", "{}")])
    assert parse("(do f){}(/do)", tools={}) == (None, "{}", [])
    assert_same_however_cut(bad, random.Random(0))


def test_two_parts_of_a_kind_are_separated() -> None:
    assert parse("One.(do f){}(/do)Two.(muse)a(/muse)(muse)b(/muse)") == (
        "a\nb",
        "One.\nTwo.",
        [("f", "{}")],
    )


def test_the_prompt_may_begin_a_part() -> None:
    assert parse("Why?(/muse)So.", prompt_end="hi[assistant](muse)") == ("Why?", "So.", [])
    assert parse("So.", prompt_end="[assistant](muse)(/muse)") == (None, "So.", [])


@settings(max_examples=150)
@given(
    st.lists(
        st.sampled_from(
            ["(muse)", "(/muse)", "(do f)", "(/do)", "{}", '{"a": 1}', "(end)", "(", "do", "\n",
             " ", "text", "é🎉", "{"]
        ),
        max_size=12,
    ),
    st.randoms(),
)  # fmt: skip
def test_any_text_parses_the_same_however_it_is_cut(
    fragments: list[str], rng: random.Random
) -> None:
    assert_same_however_cut("".join(fragments), rng)


# -- choosing it -----------------------------------------------------------------------------


def test_the_template_is_used_if_no_other_format_is_found() -> None:
    assert FORMAT.tool_format == "response_template"
    of = MessageFormat.of
    template = TOKENIZER.response_template
    assert of(load_settings(), "<tool_call>", template).tool_format == "hermes"
    assert of(load_settings(tool_call_parser="none"), "", template).tool_format is None
    assert of(load_settings(), "", None).tool_format is None
    with pytest.raises(ConfigurationError, match="has no response_template"):
        of(load_settings(tool_call_parser="response_template"), "", None)
    for broken in ({"fields": {}}, {"fields": {"content": {"content": "poem"}}}, {}):
        with pytest.raises(ConfigurationError, match="response_template cannot be used"):
            of(load_settings(), "", new_tokenizer(broken).response_template)
    assert byte_tokenizer().response_template is None


def test_only_control_tokens_of_the_template_are_shown() -> None:
    assert set(FORMAT.control_tokens(with_tools=True)) == set(CONTROL_TOKENS) - {"(other)"}


async def test_answers_over_http(engine: FakeEngineClient) -> None:
    tokenizer = new_tokenizer()
    engine.vocab_size = tokenizer.vocab_size
    engine.max_model_len = engine.num_blocks = 2048
    text = "(muse)Why?(/muse)(other)Let me see.\n" + ONE
    engine.scripts = lambda request, choice: Script(tokenizer.backend.encode(text).ids)
    tools = [{"type": "function", "function": {"name": "note", "parameters": TOOLS["note"]}}]
    async with app_client(make_app(engine, tokenizer)) as client:
        choice = await chat(client, tools=tools)
        message = choice["message"]
        assert prompt_text(engine, tokenizer).endswith("[assistant]")
        assert (message["reasoning"], message["content"]) == ("Why?", "Let me see.")
        [call] = message["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert arguments == {"text": "Zürich 🎉 (muse)", "level": 3}
        assert choice["finish_reason"] == "tool_calls"
        deltas = [
            chunk["choices"][0]["delta"] for chunk in await stream(client, CHAT, **HI, tools=tools)
        ]
        assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
        assert "".join(delta.get("reasoning") or "" for delta in deltas) == "Why?"
        param, error = await refusal(client, tools=tools, tool_choice="required")
        assert param == "tool_choice" and "(response_template)" in error
