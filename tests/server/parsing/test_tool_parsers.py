"""Every format of tool calls: however a text is cut, its pieces give the message of the whole."""

from __future__ import annotations

import json
import random
import time
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.server.parsing.message_events import (
    ContentText,
    ToolCallArguments,
    ToolCallStart,
    joined,
)
from quire.server.parsing.message_parser import MessageParser
from quire.server.parsing.tool_formats import TOOL_PARSERS

from .pieces import JSON, NASTY, TOOLS, WEATHER, calls_of, cut, hermes, read

Calls = list[tuple[str, Any]]


class Sample(NamedTuple):
    """A text in some format, and the content and calls that it holds."""

    format: str
    text: str
    content: str | None
    calls: Calls


D = {
    "begin": "<｜tool▁calls▁begin｜>",
    "end": "<｜tool▁calls▁end｜>",
    "call": "<｜tool▁call▁begin｜>",
    "call_end": "<｜tool▁call▁end｜>",
    "sep": "<｜tool▁sep｜>",
}
V3 = "{call}function{sep}f\n```json\n%s\n```{call_end}".format(**D)
V31 = "{call}f{sep}%s{call_end}".format(**D)

SAMPLES = [
    # -- text without a call
    *(
        Sample(name, text, text, [])
        for name in TOOL_PARSERS
        for text in (
            "",
            "Just text.",
            "  spaces \n\n around \n",
            "a < b, <tool, [TOOL], [1, 2], {x}, f(a=1) and <| or <｜ and `{}`",
            '{"answer": {"name": "get_weather"}} and [1, [2]]',
            '{"name": "Bob", "parameters": {}}',
            "see [the docs](http://x/[y]) or [f] or [f](x)",
        )
    ),
    # -- Hermes
    Sample("hermes", hermes("get_weather", WEATHER), None, [("get_weather", WEATHER)]),
    Sample("hermes", hermes("f", NASTY), None, [("f", NASTY)]),
    Sample("hermes", "Sure.\n" + hermes("f", "{}") + "\n", "Sure.", [("f", "{}")]),
    Sample("hermes", hermes("f", "{}") + "\n So.", "\n So.", [("f", "{}")]),
    Sample(
        "hermes",
        hermes("f", '{"a": 1}') + "\n" + hermes("unknown", '{"a": 2}'),
        None,
        [("f", '{"a": 1}'), ("unknown", '{"a": 2}')],
    ),
    Sample(
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "id": 7, "name": "f"}</tool_call>',
        None,
        [("f", '{"a": 1}')],
    ),
    Sample(
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        None,
        [("f", '{"a": 1}')],
    ),
    Sample("hermes", '<tool_call>{"name": "f"}</tool_call>', None, [("f", "{}")]),
    Sample("hermes", '<tool_call>{"name": "f", "arguments": null}', None, [("f", "{}")]),
    Sample(
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}}\n{"name": "f", "arguments": {"b": 2}}'
        "</tool_call>",
        None,
        [("f", "{}"), ("f", '{"b": 2}')],
    ),
    Sample(
        "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>',  # without the last brace
        None,
        [("f", '{"a": 1}')],
    ),
    Sample(
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"code": "a\n\tb"}}</tool_call>',  # raw controls
        None,
        [("f", '{"code": "a\\n\\tb"}')],
    ),
    *(
        Sample("hermes", text, text, [])
        for text in (
            "<tool_call>oops</tool_call>",
            "<tool_call>\n{'name': 'f', 'arguments': {}}\n</tool_call>",
            '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
            '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>',
            '<tool_call>{"name": "f", "arguments": "{} {}"}</tool_call>',
            '<tool_call>{"name": "a b", "arguments": {}}</tool_call>',
            '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
            '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
            '<tool_call>{"arguments": {}}</tool_call>',
            "<tool_call>",
            '<tool_call>{"name": "f", "arg',
        )
    ),
    Sample(
        "hermes",
        "<tool_call>x</tool_call>" + hermes("f", "{}"),
        "<tool_call>x</tool_call>",
        [("f", "{}")],
    ),
    # A call that breaks off after its arguments have begun to stream.
    Sample(
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>' + hermes("f", "{}"),
        "}}</tool_call>",
        [("f", '{"a": tru'), ("f", "{}")],
    ),
    # -- Llama 3
    Sample(
        "llama3_json",
        '{"name": "get_weather", "parameters": ' + WEATHER + "}",
        None,
        [("get_weather", WEATHER)],
    ),
    Sample(
        "llama3_json",
        'I call {"type": "function", "name": "f", "parameters": ' + NASTY + "} now",
        "I call now",
        [("f", NASTY)],
    ),
    Sample(
        "llama3_json",
        '{"type": "function", "function": "f", "parameters": {}}; '
        '{"name": "f", "arguments": {"a": 1}}',
        None,
        [("f", "{}"), ("f", '{"a": 1}')],
    ),
    Sample(
        "llama3_json",
        '<|python_tag|>{"name": "other", "parameters": {"q": "x"}}',
        None,
        [("other", '{"q": "x"}')],
    ),
    *(
        Sample("llama3_json", text, text, [])
        for text in (
            '<|python_tag|>print("hi")',
            '{"name": "f"}',
            '{"parameters": {}, "name": "f"}',
            '{"name": "f", "extra": 1, "parameters": {}}',
        )
    ),
    # -- Pythonic
    Sample(
        "pythonic",
        '[get_weather(city="O\'Hare ]), \\"x\\"", days=[1, (2, 3)], m={\'k\': -1.5, "t": true})]',
        None,
        [
            (
                "get_weather",
                '{"city": "O\'Hare ]), \\"x\\"", "days": [1, [2, 3]], "m": {"k": -1.5, "t": true}}',
            )
        ],
    ),
    Sample("pythonic", r"[f(a='it\'s )')]", None, [("f", '{"a": "it\'s )"}')]),
    Sample("pythonic", "[f(), f(a=None),]", None, [("f", "{}"), ("f", '{"a": null}')]),
    Sample(
        "pythonic",
        '<|python_start|>[other(a="""x"y\nz""", b=\'é\')]<|python_end|>',
        None,
        [("other", '{"a": "x\\"y\\nz", "b": "é"}')],
    ),
    Sample("pythonic", "Well: [f(a=1)] then", "Well: then", [("f", '{"a": 1}')]),
    *(
        Sample("pythonic", text, text, [])
        for text in (
            "[f(1)]",
            "[f(a=g())]",
            "[f(a=x)]",
            "[f(**{})]",
            "[f(a=1, a=2)]",
            "[f(a=b'x')]",
            "[f(a=1e999)]",
            "[f(a='\\ud800')]",
            "[f(a=__import__('os').system('true'))]",
            "[f(a=1 # )\n)]",
            "[other()]",
            "[f(a=1) oops]",
            "[f(a='",
            "<|python_start|>f()",
        )
    ),
    # -- Mistral
    Sample(
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": ' + NASTY + '}, {"name": "g", "arguments": {}, '
        '"id": "abcdefghi"}]',
        None,
        [("f", NASTY), ("g", "{}")],
    ),
    Sample(
        "mistral",
        'Hm. [TOOL_CALLS]f{"a": "]"}[TOOL_CALLS]g[CALL_ID]abc123DEF[ARGS]{"b": 1}',
        "Hm.",
        [("f", '{"a": "]"}'), ("g", '{"b": 1}')],
    ),
    *(
        Sample("mistral", text, text, [])
        for text in ("[TOOL_CALLS]", "[TOOL_CALLS] no call", "[TOOL_CALLS][]", "[TOOL_CALLS]f[1]")
    ),
    # -- DeepSeek
    Sample(
        "deepseek_v3",
        "Hi" + D["begin"] + V3 % NASTY + "\n" + V3 % "{}" + D["end"],
        "Hi",
        [("f", NASTY), ("f", "{}")],
    ),
    Sample(
        "deepseek_v3", D["begin"] + V31 % '{"a": "```"}' + D["end"], None, [("f", '{"a": "```"}')]
    ),
    *(
        Sample("deepseek_v3", text, text, [])
        for text in (D["begin"] + "x", D["begin"] + D["call"] + "f" + D["sep"] + "x")
    ),
]


def parse(format: str, *pieces: str) -> tuple[str | None, Calls]:
    message = read(MessageParser(TOOL_PARSERS[format](TOOLS)), list(pieces))
    return message["content"], calls_of(message)


def assert_same_however_cut(format: str, text: str, rng: random.Random, times: int) -> None:
    whole = parse(format, text)
    assert parse(format, *text) == whole
    for _ in range(times):
        assert parse(format, *cut(text, rng)) == whole


@pytest.mark.parametrize(
    "sample", SAMPLES, ids=lambda sample: f"{sample.format}-{sample.text[:40]}"
)
def test_samples(sample: Sample) -> None:
    expected = (sample.content, sample.calls)
    assert parse(sample.format, sample.text) == expected
    assert_same_however_cut(sample.format, sample.text, random.Random(sample.text), 10)


@pytest.mark.parametrize(
    "sample", SAMPLES, ids=lambda sample: f"{sample.format}-{sample.text[:40]}"
)
def test_samples_that_break_off_anywhere(sample: Sample) -> None:
    rng = random.Random(sample.text)
    calls = sample.calls
    for length in range(len(sample.text)):
        text = sample.text[:length]
        assert_same_however_cut(sample.format, text, rng, 1)
        content, begun = parse(sample.format, text)
        if not begun:
            assert (content or "") == text
        for (name, arguments), (full_name, full) in zip(begun, calls, strict=False):
            assert name == full_name and full.startswith(arguments)


FRAGMENTS = st.sampled_from(
    [
        *(marker for parser in TOOL_PARSERS.values() for marker in parser.markers),
        *(token for parser in TOOL_PARSERS.values() for token in parser.control_tokens),
        '{"name": "f", "arguments": ', '{"name": "f", "parameters": ', '"name"', "f", "f(", "a=1",
        "{}", "}", "{", "[", "]", "(", ")", ",", ";", ":", '"', "'", "\\", "\n", " ", "```json\n",
        "```", '{"a": "b"}', "null", "1", "é🎉", "<think>", "</think>", "text", "function",
    ]
)  # fmt: skip


@settings(max_examples=500)
@given(st.sampled_from(sorted(TOOL_PARSERS)), st.lists(FRAGMENTS, max_size=14), st.randoms())
def test_any_text_parses_the_same_however_it_is_cut(
    format: str, fragments: list[str], rng: random.Random
) -> None:
    text = "".join(fragments)
    assert_same_however_cut(format, text, rng, 3)
    content, calls = parse(format, text)
    if not calls and format != "openai":  # in harmony, control tokens are never part of the content
        assert (content or "") == text


OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=4)


@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]), st.randoms())
def test_any_arguments_are_returned_unchanged(
    arguments: dict[str, Any], ascii: bool, indent: int | None, rng: random.Random
) -> None:
    text = json.dumps(arguments, ensure_ascii=ascii, indent=indent)
    assert parse("hermes", *cut(hermes("f", text), rng)) == (None, [("f", text)])
    assert parse("mistral", *cut(f"[TOOL_CALLS]f{text}", rng)) == (None, [("f", text)])
    assert parse("deepseek_v3", *cut(D["begin"] + V3 % text + D["end"], rng)) == (
        None,
        [("f", text)],
    )
    assert parse("llama3_json", *cut(f'{{"name": "f", "parameters": {text}}}', rng)) == (
        None,
        [("f", text)],
    )


@given(st.dictionaries(st.from_regex(r"k[a-z_]{0,5}", fullmatch=True), JSON), st.randoms())
def test_any_python_literals_are_parsed(arguments: dict[str, Any], rng: random.Random) -> None:
    text = "[f(" + ", ".join(f"{name}={value!r}" for name, value in arguments.items()) + ")]"
    content, [(name, read_back)] = parse("pythonic", *cut(text, rng))
    assert (content, name) == (None, "f")
    assert json.loads(read_back) == arguments


def test_nothing_is_held_back_for_longer_than_needed() -> None:
    parser = TOOL_PARSERS["hermes"](TOOLS)
    assert parser.feed("Hello") == [ContentText("Hello")]
    assert parser.feed(" <tool") == []
    assert parser.feed("box>") == [ContentText(" <toolbox>")]
    assert parser.feed('\n<tool_call>{"name": "f", "arguments": ') == []
    start, arguments = parser.feed('{"a')
    assert isinstance(start, ToolCallStart) and start.name == "f"
    assert arguments == ToolCallArguments(0, '{"a')
    for piece in ('": "x', "</tool", "_call>", " y\\", 'n"', ', "b": tr'):
        assert joined(parser.feed(piece)) == [ToolCallArguments(0, piece)]
    parser = TOOL_PARSERS["llama3_json"](TOOLS)
    assert parser.feed('{"na') == []
    assert parser.feed('mes": ["x') == [ContentText('{"names": ["x')]
    parser = TOOL_PARSERS["pythonic"](TOOLS)
    assert parser.feed("[get_weather") == []
    assert parser.feed("s, ") == [ContentText("[get_weathers,")]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("pythonic", "[f(" * 20_000),
        ("pythonic", "[f(a=" + "-" * 60_000 + "1)]"),
        ("pythonic", "[f(a=" + "(" * 30_000 + ")" * 30_000 + ")]"),
        ("llama3_json", '{"name": "f", "parameters": ' * 3_000),
        ("llama3_json", '{"type": ' * 8_000),
        ("hermes", '<tool_call>{"a": ["' * 4_000),
        ("hermes", "<tool_call>" + " " * 60_000),
        ("hermes", "\n" * 60_000),
        ("mistral", "[TOOL_CALLS]" * 5_000),
        ("deepseek_v3", (D["begin"] + D["call"]) * 2_000),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_text_takes_linear_time(format: str, text: str) -> None:
    pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
    began = time.process_time()
    content, calls = parse(format, *pieces)
    assert time.process_time() - began < 5
    assert calls or content == text
