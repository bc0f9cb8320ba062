"""`tool_choice` required, or a function by name: a grammar in which the model can only call.

The grammar is that of the model's own format (tool_formats.py), arguments by the tool's schema.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from ...engine.errors import InvalidRequestError
from ...engine.grammar.compile import with_json_options
from ...engine.request import GrammarSpec
from ..parsing.harmony import ANALYSIS, ASSISTANT, CHANNEL, CONSTRAIN, END, FUNCTIONS, MESSAGE
from ..parsing.message_parser import prompt_end
from ..parsing.reasoning import CLOSE, OPEN, starts_inside
from .chat_prompt import forces_call, offered_tools
from .protocol import ChatBody
from .state import ServerState
from .structured import MAX_GRAMMAR_BYTES, Constraint
from .tool_choice import NamedTool


class _Shape(NamedTuple):
    """How calls are written: each is `before`, name, `between`, arguments, `after`."""

    first: str
    before: str
    between: str
    after: str
    separator: str
    last: str


_NAMED = '{"name": "', '", "arguments": ', "}"


def _shape(parser: str, template: str) -> _Shape | None:
    """As the model's chat template writes earlier calls; None where no grammar is known."""
    match parser:
        case "hermes":
            before, between, after = _NAMED
            return _Shape("", "<tool_call>\n" + before, between, after + "\n</tool_call>", "\n", "")
        case "llama3_json":
            return _Shape("", '{"name": "', '", "parameters": ', "}", "; ", "")
        case "mistral" if "[ARGS]" in template:
            return _Shape("", "[TOOL_CALLS]", "[ARGS]", "", "", "")
        case "mistral":
            return _Shape("[TOOL_CALLS][", *_NAMED, ", ", "]")
        case "deepseek_v3":
            begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
            call, sep, call_end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
            if "```json" in template:
                return _Shape(
                    begin, f"{call}function{sep}", "\n```json\n", f"\n```{call_end}", "\n", end
                )
            return _Shape(begin, call, sep, call_end, "", end)
        case "openai":
            before, between = f"{CHANNEL}commentary to={FUNCTIONS}", f" {CONSTRAIN}json{MESSAGE}"
            return _Shape("", before, between, "", "", "")
    return None


class _Reasoning(NamedTuple):
    """What may come before the calls."""

    rule: str = ""
    """Nothing, `reasoning`, or `(opening reasoning)?`."""
    opening: str = OPEN
    closing: str = CLOSE
    after: str = r"/\n{0,2}/"
    """Lark for what stands between it and the calls."""


def forced_call(state: ServerState, body: ChatBody, prompt: list[int]) -> Constraint | None:
    """What the answer must match; None where no call is forced. Raises InvalidRequestError."""
    choice = body.tool_choice
    if not forces_call(body):
        return None
    template = body.chat_template or state.tokenizer.chat_template or ""
    shape = _shape(state.message_format.tool_format or "", template)
    if shape is None:
        raise InvalidRequestError(
            "no call can be forced in this model's format; tool_choice can be none or auto",
            "tool_choice",
        )
    tools = [tool["function"] for tool in offered_tools(body)]
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool["name"] == choice.name]
    many = choice == "required" and body.parallel_tool_calls is not False
    if state.message_format.is_harmony:
        many = False  # a call ends the answer
        shape, reasoning = _in_harmony(state, body, prompt, shape)
    else:
        reasoning = _reasoning(state, body, prompt)
    text = _grammar(shape, tools, many, reasoning, state.tokenizer.special_ids)
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidRequestError(
            f"the tools are more than {MAX_GRAMMAR_BYTES} bytes, too many to force a call",
            "tool_choice",
        )
    return Constraint(GrammarSpec("grammar", text), "tool_choice")


def _reasoning(state: ServerState, body: ChatBody, prompt: list[int]) -> _Reasoning:
    style = state.message_format.reasoning
    if style is None:
        return _Reasoning()
    continued = body.messages[-1].content if body.continue_final_message else None
    if starts_inside(style, prompt_end(state.tokenizer, prompt), continued):
        return _Reasoning("reasoning")
    return _Reasoning("" if continued is not None else "(opening reasoning)?")


def _in_harmony(
    state: ServerState, body: ChatBody, prompt: list[int], shape: _Shape
) -> tuple[_Shape, _Reasoning]:
    """A message of analysis, if any, and one to a function; first the end of a message that the
    answer continues."""
    if body.continue_final_message:
        return shape._replace(first=END + ASSISTANT), _Reasoning()
    inside = prompt_end(state.tokenizer, prompt).endswith(ANALYSIS)
    rule = "reasoning" if inside else "(opening reasoning)?"
    return shape, _Reasoning(rule, ANALYSIS, END, _literal(ASSISTANT, state.tokenizer.special_ids))


def _grammar(
    shape: _Shape,
    tools: list[dict[str, Any]],
    many: bool,
    reasoning: _Reasoning,
    special_ids: dict[str, int],
) -> str:
    def literal(text: str) -> str:
        return _literal(text, special_ids)

    calls = f"call ({literal(shape.separator)} call)*" if many else "call"
    rules = [
        f"start: {reasoning.rule} {literal(shape.first)} {calls} {literal(shape.last)}",
        "call: " + " | ".join(f"call_{number}" for number in range(len(tools))),
    ]
    for number, tool in enumerate(tools):
        schema = json.dumps(with_json_options({**tool["parameters"], "type": "object"}))
        before = literal(shape.before + tool["name"] + shape.between)
        rules.append(f"call_{number}: {before} %json {schema} {literal(shape.after)}")
    if reasoning.rule:
        lazy = "" if reasoning.closing in special_ids else "[lazy]"  # a control token is never text
        rules += [
            f"opening: {literal(reasoning.opening)}",
            f"reasoning: thoughts {reasoning.after}",
            rf"thoughts{lazy}: /(.|\n)*/ {literal(reasoning.closing)}",
        ]
    return "\n".join(rules) + "\n"


def _literal(text: str, special_ids: dict[str, int]) -> str:
    """Lark for `text`; what is a control token must be written as that token."""
    spellings = "|".join(map(re.escape, sorted(special_ids, key=len, reverse=True)))
    pieces = re.split(f"({spellings})", text) if spellings else [text]
    return " ".join(
        f"<[{special_ids[piece]}]>" if piece in special_ids else json.dumps(piece)
        for piece in pieces
        if piece
    )
