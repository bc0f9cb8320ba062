"""Calls as JSON objects: between tags, and in the formats of Llama, Mistral, DeepSeek and Kimi."""

from __future__ import annotations

import json
from typing import Any

from ..pieces import NASTY, WEATHER, hermes
from .sample import FormatSamples, Quirk


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def named(name: str, arguments: dict[str, Any], key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {dump(arguments)}}}'


def tagged(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


def with_arguments(text: str) -> str:
    return tagged(f'{{"name": "f", "arguments": {text}}}')


HERMES = FormatSamples(
    "hermes",
    lambda name, arguments: hermes(name, dump(arguments)),
    quirks=(
        Quirk(hermes("get_weather", WEATHER), None, [("get_weather", WEATHER)]),
        Quirk(hermes("f", NASTY), None, [("f", NASTY)]),
        Quirk("Sure.\n" + hermes("f", "{}") + "\n", "Sure.", [("f", "{}")]),
        Quirk(hermes("f", "{}") + "\n So.", "\n So.", [("f", "{}")]),
        Quirk(
            hermes("f", "{}") + " and " + hermes("f", '{"a": 1}'),
            " and",
            [("f", "{}"), ("f", '{"a": 1}')],
        ),
        # other keys, other orders, other members
        Quirk(
            '<tool_call>{"arguments": {"a": 1}, "id": 7, "name": "f"}</tool_call>',
            None,
            [("f", '{"a": 1}')],
        ),
        Quirk('<tool_call>{"name": "f"}</tool_call>', None, [("f", "{}")]),
        Quirk('<tool_call>{"name": "f", "arguments": null}', None, [("f", "{}")]),
        Quirk(
            tagged(
                '{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "id": 1}'
            ),
            None,
            [("f", '{"a": 1}')],
        ),
        # several objects, or a list of them
        Quirk(
            tagged('{"name": "f", "arguments": {}}\n{"name": "f", "arguments": {"b": 2}}'),
            None,
            [("f", "{}"), ("f", '{"b": 2}')],
        ),
        Quirk(
            tagged('[{"name": "f", "arguments": {"a": "]"}}, {"name": "note", "arguments": {}}]'),
            None,
            [("f", '{"a": "]"}'), ("note", "{}")],
        ),
        Quirk(tagged('[{"name": "f", "arguments": {}},\n]'), None, [("f", "{}")]),
        # arguments as the JSON text of an object
        Quirk(with_arguments(r'"{\"a\": 1}"'), None, [("f", '{"a": 1}')]),
        Quirk(with_arguments(r'"{\"a\": \"x\\\"y\"}"'), None, [("f", r'{"a": "x\"y"}')]),
        Quirk(with_arguments('""'), None, [("f", "{}")]),
        Quirk(with_arguments("\"{'a': True}\""), None, [("f", '{"a": true}')]),
        # the last brace is missing
        Quirk(
            '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>',
            None,
            [("f", '{"a": 1}')],
        ),
        # what JSON does not allow
        Quirk(with_arguments('{"code": "a\n\tb\x01"}'), None, [("f", r'{"code": "a\n\tb\u0001"}')]),
        Quirk(with_arguments(r'{"a": "it\'s"}'), None, [("f", """{"a": "it's"}""")]),
        Quirk(with_arguments(r'{"a": "\d+\.\u12"}'), None, [("f", r'{"a": "\\d+\\.\\u12"}')]),
        Quirk(with_arguments('{"a": [1, 2, ], }'), None, [("f", '{"a": [1, 2 ] }')]),
        Quirk(
            tagged("{'name': 'f', 'arguments': {'a': 'say \"x\"', 'b': [True, False, None]}}"),
            None,
            [("f", r'{"a": "say \"x\"", "b": [true, false, null]}')],
        ),
        Quirk(tagged('{"name": "f", "arguments": {},}'), None, [("f", "{}")]),
        Quirk(
            with_arguments(r"{'a': '\xe9\U0001f389\U00110000', 'b': \"\x41\"}".replace('\\"', '"')),
            None,
            [("f", r'{"a": "\u00e9\ud83c\udf89\\U00110000", "b": "\\x41"}')],
        ),
        # a call after something that is none
        Quirk(
            "<tool_call>x</tool_call>" + hermes("f", "{}"),
            "<tool_call>x</tool_call>",
            [("f", "{}")],
        ),
        # a call that breaks off after its arguments have begun to stream
        Quirk(
            with_arguments('{"a": tru}') + hermes("f", "{}"),
            "}}\n</tool_call>",
            [("f", '{"a": tru'), ("f", "{}")],
        ),
    ),
    no_calls=(
        "<tool_call>oops</tool_call>",
        with_arguments("[1]"),
        with_arguments('"[1]"'),
        with_arguments('"{} {}"'),
        tagged('{"name": "a b", "arguments": {}}'),
        tagged('{"name": 1, "arguments": {}}'),
        tagged('{"name": "\\ud800", "arguments": {}}'),
        tagged('{"arguments": {}}'),
        tagged('{"function": {"function": {"name": "f"}}}'),
        tagged("[]"),
        "<tool_call>",
        '<tool_call>{"name": "f", "arg',
    ),
    hostile=(
        '<tool_call>{"a": ["' * 4_000,
        "<tool_call>" + " " * 15_000,
        "\n" * 15_000,
        '<tool_call>{"function": ' * 3_000,
        '<tool_call>{"name": "f", "arguments": {"a": [' + "1, " * 6_000,
        '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 15_000,
        '<tool_call>{"name": "f", "arguments": "' + "\\'" * 15_000,
    ),
)

LLAMA = FormatSamples(
    "llama3_json",
    lambda name, arguments: named(name, arguments, "parameters"),
    lambda calls: "<|python_tag|>" + "; ".join(calls),
    quirks=(
        Quirk(
            '{"name": "get_weather", "parameters": ' + WEATHER + "}",
            None,
            [("get_weather", WEATHER)],
        ),
        Quirk(
            'I call {"type": "function", "name": "f", "parameters": ' + NASTY + "} now",
            "I call now",
            [("f", NASTY)],
        ),
        Quirk(
            '{"type": "function", "function": "f", "parameters": {}}; '
            '{"name": "f", "arguments": {"a": 1}}',
            None,
            [("f", "{}"), ("f", '{"a": 1}')],
        ),
        Quirk(
            '<|python_tag|>{"name": "other", "parameters": {"q": "x"}}',
            None,
            [("other", '{"q": "x"}')],
        ),
        Quirk(
            '{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}',
            None,
            [("f", '{"a": 1}')],
        ),
        Quirk("{'name': 'f', 'parameters': {'a': None,}}", None, [("f", '{"a": null}')]),
    ),
    no_calls=(
        '<|python_tag|>print("hi")',
        '{"name": "f"}',
        '{"parameters": {}, "name": "f"}',
        '{"name": "f", "extra": 1, "parameters": {}}',
    ),
    hostile=('{"name": "f", "parameters": ' * 3_000, '{"type": ' * 8_000),
)

MISTRAL = FormatSamples(
    "mistral",
    lambda name, arguments: f"[TOOL_CALLS]{name}[ARGS]{dump(arguments)}",
    "".join,
    quirks=(
        Quirk(
            '[TOOL_CALLS][{"name": "f", "arguments": ' + NASTY + '}, {"name": "g", "arguments": {},'
            ' "id": "abcdefghi"}]',
            None,
            [("f", NASTY), ("g", "{}")],
        ),
        Quirk(
            'Hm. [TOOL_CALLS]f{"a": "]"}[TOOL_CALLS]g[CALL_ID]abc123DEF[ARGS]{"b": 1}',
            "Hm.",
            [("f", '{"a": "]"}'), ("g", '{"b": 1}')],
        ),
        Quirk(r'[TOOL_CALLS]f[ARGS]"{\"a\": 2}"', None, [("f", '{"a": 2}')]),
    ),
    no_calls=("[TOOL_CALLS]", "[TOOL_CALLS] no call", "[TOOL_CALLS][]", "[TOOL_CALLS]f[1]"),
    hostile=("[TOOL_CALLS]" * 5_000,),
)

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def v3(name: str, arguments: str) -> str:
    return f"{CALL}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}"


DEEPSEEK = FormatSamples(
    "deepseek_v3",
    lambda name, arguments: f"{CALL}{name}{SEPARATOR}{dump(arguments)}{CALL_END}",
    lambda calls: BEGIN + "".join(calls) + END,
    quirks=(
        Quirk(
            "Hi" + BEGIN + v3("f", NASTY) + "\n" + v3("f", "{}") + END,
            "Hi",
            [("f", NASTY), ("f", "{}")],
        ),
        Quirk(
            f'{BEGIN}{CALL}f{SEPARATOR}{{"a": "```"}}{CALL_END}{END}', None, [("f", '{"a": "```"}')]
        ),
        Quirk(
            f'{BEGIN}{CALL}function{SEPARATOR}{{"a": 1}}{CALL_END}{END}',
            None,
            [("function", '{"a": 1}')],
        ),
    ),
    no_calls=(BEGIN + "x", BEGIN + CALL + "f" + SEPARATOR + "x", BEGIN + CALL + "f" + SEPARATOR),
    hostile=((BEGIN + CALL) * 2_000,),
)

KIMI = FormatSamples(
    "kimi_k2",
    lambda name, arguments: (
        f"<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>"
        f"{dump(arguments)}<|tool_call_end|>"
    ),
    lambda calls: "<|tool_calls_section_begin|>" + "".join(calls) + "<|tool_calls_section_end|>",
    quirks=(
        Quirk(
            "<|tool_calls_section_begin|>\n<|tool_call_begin|> f <|tool_call_argument_begin|> {}"
            "<|tool_call_end|>\n<|tool_calls_section_end|>",
            None,
            [("f", "{}")],
        ),
    ),
    no_calls=(
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0 {}",
    ),
    hostile=("<|tool_calls_section_begin|><|tool_call_begin|>" * 2_000,),
)

MINIMAX_M1 = FormatSamples(
    "minimax",
    named,
    lambda calls: "<tool_calls>\n" + "\n".join(calls) + "\n</tool_calls>",
    quirks=(
        Quirk('<tool_calls>[{"name": "f", "arguments": {}}]</tool_calls>', None, [("f", "{}")]),
    ),
    no_calls=("<tool_calls></tool_calls>",),
)

NEMOTRON = FormatSamples(
    "nemotron_json",
    named,
    lambda calls: "<TOOLCALL>[" + ", ".join(calls) + "]</TOOLCALL>",
    no_calls=("<TOOLCALL>[]</TOOLCALL>",),
)

GRANITE = FormatSamples(
    "granite",
    named,
    lambda calls: "<|tool_call|>[" + ", ".join(calls) + "]",
    quirks=(
        Quirk('<tool_call>[{"name": "f", "arguments": {}}]', None, [("f", "{}")]),
        Quirk('<|tool_call|>{"name": "f", "arguments": {}} ok', " ok", [("f", "{}")]),
    ),
    no_calls=("<|tool_call|>[", "<|tool_call|>[1]"),
)

PHI4_MINI = FormatSamples(
    "phi4_mini_json",
    named,
    lambda calls: "<|tool_call|>[" + ", ".join(calls) + "]<|/tool_call|>",
    quirks=(
        Quirk('functools[{"name": "f", "arguments": {"a": 1}}]', None, [("f", '{"a": 1}')]),
        Quirk(
            '<|tool_call|>[{"type": "function", "function": {"name": "f", "arguments": {}}}]',
            None,
            [("f", "{}")],
        ),
    ),
    no_calls=("use functools[0] or functools.partial",),
)

COMMAND_A = FormatSamples(
    "cohere_command3",
    lambda name, arguments: (
        f'    {{"tool_call_id": "3", "tool_name": "{name}", "parameters": {dump(arguments)}}}'
    ),
    lambda calls: "<|START_ACTION|>[\n" + ",\n".join(calls) + "\n]<|END_ACTION|>",
    no_calls=("<|START_ACTION|><|END_ACTION|>",),
)

COMMAND_R = FormatSamples(
    "command_r",
    lambda name, arguments: (
        f'    {{\n        "tool_name": "{name}",\n        "parameters": {dump(arguments)}\n    }}'
    ),
    lambda calls: "Action: ```json\n[\n" + ",\n".join(calls) + "\n]```",
    no_calls=("Action: ```json\n{}\n```", "Action: go"),
)

GENERIC = HERMES._replace(format="generic", quirks=HERMES.quirks[:3], hostile=())

SAMPLES = (
    *(HERMES, LLAMA, MISTRAL, DEEPSEEK, KIMI, MINIMAX_M1, GRANITE, PHI4_MINI, COMMAND_A),
    *(COMMAND_R, NEMOTRON, GENERIC),
)
