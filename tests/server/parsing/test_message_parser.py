from __future__ import annotations

import time

import pytest

from quire.server.parsing.formats.tagged_json import HermesParser
from quire.server.parsing.formats.tool_formats import (
    CANONICAL_NAMES,
    TOOL_FORMATS,
    detect_tool_format,
)
from quire.server.parsing.message_events import (
    ContentText,
    Event,
    ReasoningText,
    ToolCallArguments,
    ToolCallStart,
    joined,
)
from quire.server.parsing.message_parser import MessageParser
from quire.server.parsing.reasoning import ReasoningParser, detect_reasoning
from quire.server.settings import Settings

from .pieces import TOOLS, calls_of, hermes, read


def test_calls_are_parsed_only_after_the_reasoning() -> None:
    text = "<think>" + hermes("f", "{}") + "</think>\n\nOk.\n" + hermes("f", '{"a": 1}')
    for pieces in ([text], list(text)):
        parser = MessageParser(HermesParser(TOOLS), ReasoningParser(opened=False))
        message = read(parser, pieces)
        assert message["content"] == "Ok."
        assert calls_of(message) == [("f", '{"a": 1}')]


def test_neighbours_of_one_kind_are_joined() -> None:
    starts = [ToolCallStart(0, "a", "f"), ToolCallStart(1, "b", "f")]
    events: list[Event] = [
        *(ReasoningText("a"), ReasoningText("b"), ContentText("c"), ContentText("d")),
        *(ReasoningText("e"), *starts, ToolCallArguments(0, "{"), ToolCallArguments(0, "}")),
        ToolCallArguments(1, "{}"),
    ]
    assert joined(events) == [
        *(ReasoningText("ab"), ContentText("cd"), ReasoningText("e"), *starts),
        *(ToolCallArguments(0, "{}"), ToolCallArguments(1, "{}")),
    ]


def test_a_million_pieces_are_joined_in_a_time_that_does_not_grow_with_their_square() -> None:
    """A parser by a tokenizer's template returns an event for each character."""
    pieces = [ContentText("x" * 4)] * 1_000_000
    began = time.process_time()
    assert joined(pieces) == [ContentText("x" * 4_000_000)]
    assert time.process_time() - began < 10


def test_parts_that_were_not_requested_are_left_out() -> None:
    parser = MessageParser(
        HermesParser(TOOLS),
        ReasoningParser(opened=True),
        show_reasoning=False,
        max_calls=1,
    )
    events = parser.feed("why</think>" + hermes("f", "{}") + hermes("f", '{"a": 1}'))
    events += parser.finish()
    assert [type(event) for event in events] == [ToolCallStart, ToolCallArguments]
    assert parser.finish_reason("stop") == "tool_calls"
    assert parser.finish_reason("length") == "length"
    assert parser.finish_reason(None) is None


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ x }}", None, None),
        ("<|start|>assistant<|channel|>final", "openai", "openai_gptoss"),
        ("<tool_call>", "hermes", None),
        ("<tool_call> <tool_response> <|start_of_role|>", "hermes", None),
        ("<tool_call><function=x><parameter=", "qwen3_coder", None),
        ("<seed:tool_call><function=x><parameter=", "seed_oss", None),
        ("<tool_call>{name}<arg_key> <think>", "glm45", "qwen3"),
        ("<|tool_calls_section_begin|><|tool_call_begin|>", "kimi_k2", None),
        ('<minimax:tool_call><invoke name="', "minimax_m2", None),
        ("<tool_calls>", "minimax", None),
        ("<start_function_call>call:", "functiongemma", None),
        ("<|tool_call>call: <|channel>thought", "gemma4", "gemma4"),
        ("[TOOL_CALLS] [THINK]", "mistral", "mistral"),
        ("<|START_ACTION|> <|START_THINKING|>", "cohere_command3", "cohere_command3"),
        ("<seed:tool_call> <seed:think> <think>", "seed_oss", "seed_oss"),
        ("```tool_code", "gemma3", None),
        ("<function_calls>", "olmo3", None),
        ("<|tool_call_start|>", "lfm2", None),
        ("<|START_ACTION|> Action:", "cohere_command3", None),
        ("Write 'Action:' followed by a list", "command_r", None),
        ("<|tool|>{{ tools }}<|/tool|>", "phi4_mini_json", None),
        ("<|start_header_id|><TOOLCALL>", "nemotron_json", None),
        ("<|start_of_role|> <|tool_call|>", "granite", None),
        ("<tool_call> <think> </think>", "hermes", "qwen3"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral", None),
        ("<｜tool▁calls▁begin｜> content.split('</think>')[-1]", "deepseek_v3", "deepseek_r1"),
        ("<|python_start|> <|python_tag|>", "pythonic", None),
        ("<|python_tag|>", "llama3_json", None),
        ("<|start_header_id|> '{\"name\": ' '\"parameters\": '", "llama3_json", None),
        ("'{\"name\": ' '\"parameters\": '", None, None),
    ],
)
def test_the_template_shows_the_format(
    template: str, tools: str | None, reasoning: str | None
) -> None:
    assert detect_tool_format(template) == tools
    assert detect_reasoning(template) == reasoning


def test_the_flag_offers_every_parser() -> None:
    annotation = Settings.model_fields["tool_call_parser"].annotation
    assert {*CANONICAL_NAMES, "auto", "none"} == set(annotation.__args__)  # type: ignore[union-attr]
    names = [name for format in TOOL_FORMATS.values() for name in (format.name, *format.aliases)]
    assert len(names) == len(set(names))
