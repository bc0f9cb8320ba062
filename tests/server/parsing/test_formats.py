"""Every format of tool calls: however a text is cut, its pieces give the message of the whole."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.server.parsing.formats.tool_formats import TOOL_FORMATS
from quire.server.parsing.message_events import (
    ContentText,
    ToolCallArguments,
    ToolCallStart,
    joined,
)
from quire.server.parsing.message_parser import MessageParser
from quire.server.parsing.reasoning import ReasoningParser
from quire.server.parsing.unclosed_reasoning import UnclosedReasoning

from .pieces import JSON, TOOLS, calls_of, cut, hermes, read
from .samples import json_formats, parameter_formats, python_formats
from .samples.json_formats import BEGIN, END, named, v3
from .samples.sample import SPECIMENS, Calls, FormatSamples

SAMPLES = (*json_formats.SAMPLES, *parameter_formats.SAMPLES, *python_formats.SAMPLES)
BY_NAME = {sample.format: sample for sample in SAMPLES}
ELSEWHERE = {"openai", "response_template"}
"""Formats with parsers of their own kind: test_harmony.py and test_response_template.py."""
PLAIN = (
    "",
    "Just text.",
    "  spaces \n\n around \n",
    "a < b, <tool, [TOOL], [1, 2], {x}, f(a=1) and <| or <｜ and `{}`",
    '{"answer": {"name": "get_weather"}} and [1, [2]]',
    '{"name": "Bob", "parameters": {}}',
    "see [the docs](http://x/[y]) or [f] or [f](x)",
)
"""Texts that are no calls in any format."""
THOUGHT = "<think>\nWhy not < this?\n</think>\n\n"


def new_parser(format: str, *, reasons: bool = False) -> MessageParser:
    parser = TOOL_FORMATS[format].parser
    if not reasons:
        return MessageParser(parser(TOOLS))
    probe = UnclosedReasoning(parser(TOOLS, only_tagged=True)) if parser.has_tags() else None
    return MessageParser(parser(TOOLS), ReasoningParser(opened=False), unclosed=probe)


def parse(format: str, *pieces: str, reasons: bool = False) -> tuple[str | None, str | None, Calls]:
    """Return the reasoning, the content and the calls of a text in pieces."""
    message = read(new_parser(format, reasons=reasons), list(pieces))
    return message.get("reasoning"), message["content"], calls_of(message)


def assert_same_however_cut(format: str, text: str, rng: random.Random, times: int = 0) -> None:
    """Parse a text whole and cut at random places; without `times` also by characters, and in two
    pieces at every place."""
    reasons = text.startswith("<think>")
    whole = parse(format, text, reasons=reasons)
    if not times:
        assert parse(format, *text, reasons=reasons) == whole
        for at in range(1, len(text)):
            assert parse(format, text[:at], text[at:], reasons=reasons) == whole
    for _ in range(times or 3):
        assert parse(format, *cut(text, rng), reasons=reasons) == whole


def values(calls: Calls) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


def specimens() -> Iterator[Any]:
    for samples in SAMPLES:
        for kind, calls in SPECIMENS.items():
            text = samples.frame([samples.call(*call) for call in calls])
            yield pytest.param(samples.format, text, calls, id=f"{samples.format}-{kind}")


def texts() -> Iterator[Any]:
    """Yield each sample's text that is not a specimen: what it is in, its content and calls."""
    for samples in SAMPLES:
        for quirk in samples.quirks:
            yield pytest.param(samples.format, *quirk, id=f"{samples.format}-{quirk.text[:40]}")
        for text in samples.no_calls:
            yield pytest.param(samples.format, text, text, [], id=f"{samples.format}-{text[:40]}")


def test_every_format_has_samples() -> None:
    assert BY_NAME.keys() | ELSEWHERE == TOOL_FORMATS.keys()
    assert len(BY_NAME) == len(SAMPLES)
    for samples in SAMPLES:
        assert samples.no_calls, f"{samples.format} needs texts that begin like a call"


@pytest.mark.parametrize(("format", "text", "calls"), list(specimens()))
def test_calls_are_read(format: str, text: str, calls: Calls) -> None:
    rng = random.Random(text)
    for before, reasoning, content in (
        ("", None, None),
        ("Let me see.\n", None, "Let me see."),
        (THOUGHT, "Why not < this?", None),
        (THOUGHT + "Über 🎉 ", "Why not < this?", "Über 🎉"),
    ):
        whole = before + text + "\n"
        read_back = parse(format, whole, reasons=before.startswith("<think>"))
        assert read_back[:2] == (reasoning, content)
        assert values(read_back[2]) == calls
        assert_same_however_cut(format, whole, rng, 0 if content == reasoning else 3)


@pytest.mark.parametrize(("format", "text", "calls"), list(specimens()))
def test_text_around_and_between_calls_is_content(format: str, text: str, calls: Calls) -> None:
    _, content, read_back = parse(format, f"First. {text}\n\nAnd then\n{text} That is all.")
    assert (content or "").split() == ["First.", "And", "then", "That", "is", "all."]
    assert values(read_back) == calls * 2


@pytest.mark.parametrize("format", BY_NAME)
def test_plain_text_is_content(format: str) -> None:
    for text in PLAIN:
        assert parse(format, text) == (None, text, [])
        assert_same_however_cut(format, text, random.Random(text))


@pytest.mark.parametrize(("format", "text", "content", "calls"), list(texts()))
def test_quirks(format: str, text: str, content: str | None, calls: Calls) -> None:
    assert parse(format, text) == (None, content, calls)
    assert_same_however_cut(format, text, random.Random(text))


@pytest.mark.parametrize(("format", "text", "content", "calls"), list(texts()))
def test_quirks_that_break_off_anywhere(
    format: str, text: str, content: str | None, calls: Calls
) -> None:
    assert_breaks_off_well(format, text, calls)


@pytest.mark.parametrize(("format", "text", "calls"), list(specimens()))
def test_calls_that_break_off_anywhere(format: str, text: str, calls: Calls) -> None:
    assert_breaks_off_well(format, text, parse(format, text)[2])


def assert_breaks_off_well(format: str, text: str, calls: Calls) -> None:
    """Check each beginning of a text, or 80 of a long one: nothing is lost, and no call is
    invented."""
    rng = random.Random(text)
    lengths = range(len(text)) if len(text) < 100 else sorted(rng.sample(range(len(text)), 80))
    for length in lengths:
        beginning = text[:length]
        _, content, begun = whole = parse(format, beginning)
        assert parse(format, *cut(beginning, rng)) == whole
        if not begun:
            assert (content or "") == beginning
        for (name, arguments), (full_name, full) in zip(begun, calls, strict=False):
            assert name == full_name and full.startswith(arguments)


# -- calls in reasoning ----------------------------------------------------------------------


@pytest.mark.parametrize("samples", SAMPLES, ids=lambda samples: samples.format)
def test_a_call_in_reasoning_that_is_never_closed_is_found(samples: FormatSamples) -> None:
    text = samples.frame([samples.call(*call) for call in SPECIMENS["parallel"]])
    open_ended = "<think>Let me < look.\n" + text
    reasoning, content, calls = parse(samples.format, open_ended, reasons=True)
    if TOOL_FORMATS[samples.format].parser.has_tags():
        assert (reasoning, content) == ("Let me < look.", None)
        assert values(calls) == SPECIMENS["parallel"]
    assert_same_however_cut(samples.format, open_ended, random.Random(0))
    # If the reasoning is closed after all, the calls belong to it.
    closed = open_ended + " Yes.</think>Right."
    reasoning, content, calls = parse(samples.format, closed, reasons=True)
    assert reasoning == open_ended.removeprefix("<think>") + " Yes."
    assert (content, calls) == ("Right.", [])
    assert_same_however_cut(samples.format, closed, random.Random(0))


def test_bare_brackets_in_reasoning_begin_no_call() -> None:
    for format, text in (
        ("pythonic", "[f(a=1)]"),
        ("llama3_json", '{"name": "f", "parameters": {}}'),
    ):
        thought = "<think>Maybe " + text
        assert parse(format, thought, reasons=True) == ("Maybe " + text, None, [])


def test_reasoning_is_held_back_only_from_a_call_on() -> None:
    parser = new_parser("hermes", reasons=True)
    parser.feed("<think>")
    for piece in ("so", " a < b <tool", "s> {}", " x"):
        assert parser.feed(piece)
    assert parser.feed("\n" + hermes("f", '{"a": 1}') + " y") == []
    events = parser.feed("</think>done")
    assert "".join(str(event[0]) for event in events).endswith(" ydone")


# -- any text --------------------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    sorted(
        {
            *(marker for format in TOOL_FORMATS.values() for marker in format.parser.markers),
            *(token for format in TOOL_FORMATS.values() for token in format.parser.control_tokens),
            *('{"name": "f", "arguments": ', '{"name": "f", "parameters": ', '"name"', "f", "f("),
            *("{}", "}", "{", "[", "]", "(", ")", ",", ";", ":", '"', "'", "\\", "\n", " ", "a=1"),
            *("```json\n", "```", '{"a": "b"}', "null", "1", "é🎉", "<think>", "</think>", "text"),
            *("function", "<function=f>", "</function>", "<parameter=a>", "</parameter>", "None"),
            *('<invoke name="f">', '<parameter name="a">', "</invoke>", "call:f{", "a:", "print("),
            *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "functions.f:0", "'a': "),
        }
    )
)


@settings(max_examples=400)
@given(st.sampled_from(sorted(BY_NAME)), st.lists(FRAGMENTS, max_size=14), st.randoms())
def test_any_text_parses_the_same_however_it_is_cut(
    format: str, fragments: list[str], rng: random.Random
) -> None:
    text = "".join(fragments)
    assert parse(format, *text) == parse(format, text)
    assert_same_however_cut(format, text, rng, 2)
    _, content, calls = parse(format, text)
    if not calls:
        assert (content or "") == text
    assert_same_however_cut(format, "<think>" + text, rng, 2)


OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=4)


@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]), st.randoms())
def test_any_json_arguments_are_returned_unchanged(
    arguments: dict[str, Any], ascii: bool, indent: int | None, rng: random.Random
) -> None:
    text = json.dumps(arguments, ensure_ascii=ascii, indent=indent)
    expected = (None, None, [("f", text)])
    assert parse("hermes", *cut(hermes("f", text), rng)) == expected
    assert parse("mistral", *cut(f"[TOOL_CALLS]f{text}", rng)) == expected
    assert parse("deepseek_v3", *cut(BEGIN + v3("f", text) + END, rng)) == expected
    assert parse("llama3_json", *cut(f'{{"name": "f", "parameters": {text}}}', rng)) == expected


@given(OBJECTS, st.randoms())
def test_any_python_dict_is_read_as_json(arguments: dict[str, Any], rng: random.Random) -> None:
    text = f"<tool_call>{{'name': 'f', 'arguments': {arguments!r}}}</tool_call>"
    _, content, [(_, read_back)] = parse("hermes", *cut(text, rng))
    if '"' not in text:  # only strings in single quotes may have Python's escapes
        assert content is None and json.loads(read_back) == arguments


NAMES = st.from_regex(r"k[a-z_]{0,5}", fullmatch=True)


@given(st.dictionaries(NAMES, JSON, max_size=4), st.sampled_from(sorted(BY_NAME)), st.randoms())
def test_any_arguments_are_read_in_every_format(
    arguments: dict[str, Any], format: str, rng: random.Random
) -> None:
    samples = BY_NAME[format]
    written = {key: value for key, value in arguments.items() if not isinstance(value, str)}
    text = samples.frame([samples.call("f", written)])
    reserved = [token for token in TOOL_FORMATS[format].parser.control_tokens if token in text]
    if format in ("functiongemma", "gemma4") and any(mark in str(written) for mark in "{}[],:'"):
        return  # keys of nested objects are written as they are
    _, content, [(name, read_back)] = parse(format, *cut(text, rng))
    assert (content, name) == (None, "f"), reserved
    assert json.loads(read_back) == written


# -- time ------------------------------------------------------------------------------------


def test_nothing_is_held_back_for_longer_than_needed() -> None:
    parser = TOOL_FORMATS["hermes"].parser(TOOLS)
    assert parser.feed("Hello") == [ContentText("Hello")]
    assert parser.feed(" <tool") == []
    assert parser.feed("box>") == [ContentText(" <toolbox>")]
    assert parser.feed('\n<tool_call>{"name": "f", "arguments": ') == []
    start, arguments = parser.feed('{"a')
    assert isinstance(start, ToolCallStart) and start.name == "f"
    assert arguments == ToolCallArguments(0, '{"a')
    for piece in ('": "x', "</tool", "_call>", " y\\n", "'s", '", "b": tr'):
        assert joined(parser.feed(piece)) == [ToolCallArguments(0, piece)]
    parser = TOOL_FORMATS["llama3_json"].parser(TOOLS)
    assert parser.feed('{"na') == []
    assert parser.feed('mes": ["x') == [ContentText('{"names": ["x')]
    parser = TOOL_FORMATS["pythonic"].parser(TOOLS)
    assert parser.feed("[get_weather") == []
    assert parser.feed("s, ") == [ContentText("[get_weathers,")]
    parser = TOOL_FORMATS["qwen3_coder"].parser(TOOLS)
    assert parser.feed("<tool_call>\n<function=note>\n<parameter=text>") != []
    for piece in ("so", " it", " </par is"):
        assert joined(parser.feed(piece)) == [ToolCallArguments(0, piece)]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        pytest.param(samples.format, text, id=f"{samples.format}-{text[:20]}")
        for samples in SAMPLES
        for text in samples.hostile
    ],
)
def test_hostile_text_takes_linear_time(format: str, text: str) -> None:
    pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
    began = time.process_time()
    _, content, calls = parse(format, *pieces)
    parse(format, "<think>", *pieces, reasons=True)
    assert time.process_time() - began < 3
    assert calls or content == text


def test_kimis_ids_are_kept_unless_they_come_twice() -> None:
    def ids(text: str) -> list[str]:
        return [call["id"] for call in read(new_parser("kimi_k2"), [text])["tool_calls"]]

    call = BY_NAME["kimi_k2"].call
    other = call("note", {}).replace(":0", ":1")
    first, second, third = ids(BY_NAME["kimi_k2"].frame([call("f", {}), other, call("f", {})]))
    assert (first, second) == ("functions.f:0", "functions.note:1")
    assert third.startswith("call_")
    assert named("f", {})
