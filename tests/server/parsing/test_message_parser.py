from __future__ import annotations

import pytest

from quire.server.parsing.message_events import ToolCallArguments, ToolCallStart
from quire.server.parsing.message_parser import MessageParser
from quire.server.parsing.reasoning import ReasoningParser, detect_reasoning
from quire.server.parsing.tool_formats import TOOL_PARSERS, detect_tool_parser
from quire.server.settings import Settings

from .pieces import TOOLS, calls_of, hermes, read


def test_calls_are_parsed_only_after_the_reasoning() -> None:
    text = "<think>" + hermes("f", "{}") + "</think>\n\nOk.\n" + hermes("f", '{"a": 1}')
    for pieces in ([text], list(text)):
        parser = MessageParser(TOOL_PARSERS["hermes"](TOOLS), ReasoningParser(opened=False))
        message = read(parser, pieces)
        assert message["content"] == "Ok."
        assert calls_of(message) == [("f", '{"a": 1}')]


def test_parts_that_were_not_requested_are_left_out() -> None:
    parser = MessageParser(
        TOOL_PARSERS["hermes"](TOOLS),
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
        ("<tool_call><function=x><parameter=", None, None),
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
    assert detect_tool_parser(template) == tools
    assert detect_reasoning(template) == reasoning


def test_the_flag_offers_every_parser() -> None:
    annotation = Settings.model_fields["tool_call_parser"].annotation
    assert set(TOOL_PARSERS) | {"auto", "none", "harmony"} == set(annotation.__args__)  # type: ignore[union-attr]
