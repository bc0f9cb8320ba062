"""Calls whose arguments stand between tags one by one, and those of FunctionGemma and Gemma 4."""

from __future__ import annotations

import json
from typing import Any

from .sample import FormatSamples, Quirk


def bare(value: Any) -> str:
    """Return a value as such a template writes it: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def qwen_call(name: str, arguments: dict[str, Any]) -> str:
    parts = [
        f"<parameter={key}>\n{bare(value)}\n</parameter>\n" for key, value in arguments.items()
    ]
    return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>"


def one(key: str, text: str, tool: str = "note") -> str:
    """Return a call with one argument, whose value is the bare `text`."""
    return f"<tool_call><function={tool}><parameter={key}>{text}</parameter></function></tool_call>"


QWEN3_CODER = FormatSamples(
    "qwen3_coder",
    qwen_call,
    quirks=(
        # values by the schema
        Quirk(one("text", "5"), None, [("note", '{"text": "5"}')]),
        Quirk(one("level", "5"), None, [("note", '{"level": 5}')]),
        Quirk(one("level", "5.0"), None, [("note", '{"level": 5}')]),
        Quirk(one("level", "None"), None, [("note", '{"level": null}')]),
        Quirk(one("level", "high"), None, [("note", '{"level": "high"}')]),
        Quirk(one("ratio", "1e3"), None, [("note", '{"ratio": 1e3}')]),
        Quirk(one("ratio", "7"), None, [("note", '{"ratio": 7}')]),
        Quirk(one("urgent", "TRUE"), None, [("note", '{"urgent": true}')]),
        Quirk(one("tags", "['a', \"b\",]"), None, [("note", '{"tags": ["a", "b"]}')]),
        Quirk(one("place", "{'name': 'Ulm'}"), None, [("note", '{"place": {"name": "Ulm"}}')]),
        Quirk(one("kind", "to do"), None, [("note", '{"kind": "to do"}')]),
        Quirk(one("code", "007"), None, [("note", '{"code": "007"}')]),
        Quirk(one("code", "7"), None, [("note", '{"code": 7}')]),
        Quirk(one("other", "[1]"), None, [("note", '{"other": [1]}')]),
        Quirk(one("other", "so it is"), None, [("note", '{"other": "so it is"}')]),
        Quirk(one("a", "true", "f"), None, [("f", '{"a": true}')]),
        # text keeps its own line breaks and spaces
        Quirk(
            one("text", "\n\n  if x < 1:\n    y\n\n"),
            None,
            [("note", '{"text": "\\n  if x < 1:\\n    y\\n"}')],
        ),
        Quirk(
            one("text", "</param></parameters>"),
            None,
            [("note", '{"text": "</param></parameters>"}')],
        ),
        # forgotten outer tags, several calls between one pair of them
        Quirk(
            "Well.\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call> So.",
            "Well. So.",
            [("f", '{"a": "x"}')],
        ),
        Quirk("<function=f></function>", None, [("f", "{}")]),
        Quirk(
            "<tool_call>\n<function=f>\n</function>\n<function=note>\n</function>\n</tool_call>",
            None,
            [("f", "{}"), ("note", "{}")],
        ),
        # a call that breaks off
        Quirk(
            "<tool_call><function=note><parameter=text>\nso f", None, [("note", '{"text": "so f')]
        ),
        Quirk("<tool_call><function=f><parameter=a>1", None, [("f", '{"a": ')]),
        Quirk(
            "<tool_call><function=f><parameter=a>1</parameter>oops",
            "oops",
            [("f", '{"a": 1')],
        ),
    ),
    no_calls=(
        "<tool_call>\n<function=f",
        "<tool_call>{}</tool_call>",
        "<function=unknown></function>",
        "<tool_call><function=a b></function></tool_call>",
        "<tool_call><function=" + "f" * 300 + ">",
    ),
    hostile=(
        "<tool_call><function=" * 3_000,
        "<tool_call><function=note><parameter=text>" + "</parameter" * 6_000,
        "<tool_call><function=note><parameter=place>" + "\n" * 15_000,
        "<tool_call><function=f>" + "<parameter=a>1</parameter>" * 3_000,
    ),
)


def seed_call(name: str, arguments: dict[str, Any]) -> str:
    parts = [f"<parameter={key}>{bare(value)}</parameter>\n" for key, value in arguments.items()]
    return f"<seed:tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</seed:tool_call>"


SEED_OSS = FormatSamples(
    "seed_oss",
    seed_call,
    quirks=(
        Quirk(
            "<seed:tool_call><function=note><parameter=text>\na\n</parameter></function>",
            None,
            [("note", '{"text": "\\na\\n"}')],
        ),
    ),
    no_calls=("<seed:tool_call>f</seed:tool_call>",),
)


def glm_call(name: str, arguments: dict[str, Any]) -> str:
    parts = [
        f"<arg_key>{key}</arg_key>\n<arg_value>{bare(value)}</arg_value>\n"
        for key, value in arguments.items()
    ]
    return f"<tool_call>{name}\n{''.join(parts)}</tool_call>"


GLM = FormatSamples(
    "glm45",
    glm_call,
    quirks=(
        Quirk(
            "<tool_call>note<arg_key>text</arg_key><arg_value>\n1\n</arg_value>"
            "<arg_key>level</arg_key><arg_value>1</arg_value></tool_call>",
            None,
            [("note", '{"text": "\\n1\\n", "level": 1}')],
        ),
        Quirk("<tool_call>f</tool_call>", None, [("f", "{}")]),
        Quirk("<tool_call>f\n</tool", None, [("f", "{}")]),
    ),
    no_calls=("<tool_call>f g</tool_call>", "<tool_call></tool_call>"),
    hostile=("<tool_call>f<arg_key>" * 3_000,),
)


def minimax_call(name: str, arguments: dict[str, Any]) -> str:
    parts = [
        f'<parameter name="{key}">{bare(value)}</parameter>\n' for key, value in arguments.items()
    ]
    return f'<invoke name="{name}">\n{"".join(parts)}</invoke>'


MINIMAX_M2 = FormatSamples(
    "minimax_m2",
    minimax_call,
    lambda calls: "<minimax:tool_call>\n" + "\n".join(calls) + "\n</minimax:tool_call>",
    no_calls=(
        "<minimax:tool_call>",
        "<minimax:tool_call><invoke>",
        '<minimax:tool_call><invoke name="a b"></invoke>',
    ),
)


def gemma_value(value: Any, quote: str) -> str:
    if isinstance(value, str):
        return quote + value + quote
    if isinstance(value, dict):
        members = (f"{key}:{gemma_value(item, quote)}" for key, item in value.items())
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(gemma_value(item, quote) for item in value) + "]"
    return json.dumps(value)


def function_gemma(name: str, arguments: dict[str, Any]) -> str:
    text = gemma_value(arguments, "<escape>")
    return f"<start_function_call>call:{name}{text}<end_function_call>"


FUNCTION_GEMMA = FormatSamples(
    "functiongemma",
    function_gemma,
    "".join,
    quirks=(
        Quirk(
            '<start_function_call>call:f{ a: "x\\"y", b : [1, ], c:{},}<end_function_call>',
            None,
            [("f", r'{"a": "x\"y", "b": [1], "c": {}}')],
        ),
        Quirk(
            "<start_function_call>call:note{text:so it is,level:2}",
            None,
            [("note", '{"text": "so it is", "level": 2}')],
        ),
        Quirk("<start_function_call>call:f{a:<escape>so", None, [("f", '{"a": "so')]),
        Quirk("<start_function_call>call:f{a:" + "[" * 99, "[" * 34, [("f", '{"a": ' + "[" * 65)]),
    ),
    no_calls=("<start_function_call>f{}", "<start_function_call>call:f"),
    hostile=(
        "<start_function_call>call:" * 3_000,
        "<start_function_call>call:f{a:" + "x" * 15_000,
        "<start_function_call>call:f{a:<escape>" + "<escap" * 6_000,
    ),
)


def gemma4(name: str, arguments: dict[str, Any]) -> str:
    text = gemma_value(arguments, '<|"|>')
    return f"<|tool_call>call:{name}{text}<tool_call|>"


GEMMA4 = FormatSamples("gemma4", gemma4, "".join, no_calls=("<|tool_call>call f{}",))

SAMPLES = (QWEN3_CODER, SEED_OSS, GLM, MINIMAX_M2, FUNCTION_GEMMA, GEMMA4)
