"""Calls as in Python."""

from __future__ import annotations

from typing import Any

from .sample import FormatSamples, Quirk


def call(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


PYTHONIC = FormatSamples(
    "pythonic",
    call,
    lambda calls: "<|python_start|>[" + ", ".join(calls) + "]<|python_end|>",
    quirks=(
        Quirk(
            '[get_weather(city="O\'Hare ]), \\"x\\"", days=[1, (2, 3)], '
            "m={'k': -1.5, \"t\": true})]",
            None,
            [
                (
                    "get_weather",
                    '{"city": "O\'Hare ]), \\"x\\"", "days": [1, [2, 3]], '
                    '"m": {"k": -1.5, "t": true}}',
                )
            ],
        ),
        Quirk(r"[f(a='it\'s )')]", None, [("f", '{"a": "it\'s )"}')]),
        Quirk("[f(), f(a=None),]", None, [("f", "{}"), ("f", '{"a": null}')]),
        Quirk(
            '<|python_start|>[other(a="""x"y\nz""", b=\'é\')]<|python_end|>',
            None,
            [("other", '{"a": "x\\"y\\nz", "b": "é"}')],
        ),
        Quirk("Well: [f(a=1)] then", "Well: then", [("f", '{"a": 1}')]),
        # names that Python reserves
        Quirk(
            "[f(from='a', class=1, None=True, import_=2, lambda = 3,)]",
            None,
            [("f", '{"from": "a", "class": 1, "None": true, "import_": 2, "lambda": 3}')],
        ),
        # line breaks in strings, and escapes
        Quirk("[f(a='x\ny', b=\"\r\n\")]", None, [("f", r'{"a": "x\ny", "b": "\r\n"}')]),
        Quirk(
            r"[f(a='\d\n\x41\'', b=r'\d')]", None, [("f", r'{"a": "\\d\nA' r"""'", "b": "\\d"}""")]
        ),
        Quirk(r'[f(a="\ud83c\udf89")]', None, [("f", '{"a": "🎉"}')]),
        # literals
        Quirk(
            "[f(a=-1, b=+2.5, c={3, 1, 2}, d=(), e={}, g={1: 'x'}, h='a' 'b', i=1_000, j=0x10)]",
            None,
            [
                (
                    "f",
                    '{"a": -1, "b": 2.5, "c": [3, 1, 2], "d": [], "e": {}, "g": {"1": "x"}, '
                    '"h": "ab", "i": 1000, "j": 16}',
                )
            ],
        ),
        Quirk("[f(a=null, b=false)]", None, [("f", '{"a": null, "b": false}')]),
        Quirk("[\n  f(\n    a=[\n      1,\n    ],\n  ),\n]", None, [("f", '{"a": [1]}')]),
    ),
    no_calls=(
        "[f(1)]",
        "[f(a=g())]",
        "[f(a=x)]",
        "[f(a=)]",
        "[f(=1)]",
        "[f(**{})]",
        "[f(a=1, a=2)]",
        "[f(a=b'x')]",
        "[f(a=f'{x}')]",
        "[f(a=1 + 1)]",
        "[f(a=2j)]",
        "[f(a=(1 for _ in []))]",
        "[f(a=1e999)]",
        "[f(a='\\ud800')]",
        "[f(a=__import__('os').system('true'))]",
        "[f(a=1 # )\n)]",
        "[other()]",
        "[print(f())]",
        "[f(a=1) oops]",
        "[f(a='",
        "[f(a='\\",
        "<|python_start|>f()",
    ),
    hostile=(
        "[f(" * 6_000,
        "[f(a=" + "-" * 15_000 + "1)]",
        "[f(a=" + "(" * 15_000 + ")" * 15_000 + ")]",
        "[f(a='" + "\n" * 15_000,
    ),
)

GEMMA3 = FormatSamples(
    "gemma3",
    call,
    lambda calls: "```tool_code\n" + "\n".join(calls) + "\n```",
    quirks=(
        Quirk("```tool_code\nprint(f(a='x'))\n```", None, [("f", '{"a": "x"}')]),
        Quirk(
            "```tool_code\n[f(), note(text='')]\n```", None, [("f", "{}"), ("note", '{"text": ""}')]
        ),
        Quirk("[f(a=1)]", None, [("f", '{"a": 1}')]),
        Quirk("```tool_code\nf()", None, [("f", "{}")]),
    ),
    no_calls=("```tool_code\nx = 1\n```", "```tool_code\nprint(print(f()))\n```"),
    hostile=("```tool_code\nprint(" * 3_000,),
)

OLMO3 = FormatSamples(
    "olmo3",
    call,
    lambda calls: "<function_calls>" + "\n".join(calls) + "</function_calls>",
    quirks=(Quirk("<function_calls>\nf()\nf()\n</function_calls>", None, [("f", "{}")] * 2),),
    no_calls=("<function_calls></function_calls>", "[f(a=1)]"),
)

LFM2 = FormatSamples(
    "lfm2",
    call,
    lambda calls: "<|tool_call_start|>[" + ", ".join(calls) + "]<|tool_call_end|>",
    no_calls=("<|tool_call_start|>", "[f(a=1)]"),
)

SAMPLES = (PYTHONIC, GEMMA3, OLMO3, LFM2)
