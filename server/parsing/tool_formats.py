"""The formats in which models write tool calls, by the names that vLLM gives them."""

from __future__ import annotations

import ast
import json
import secrets
import string
import warnings

from .harmony import CHANNEL, HarmonyParser
from .tool_parsers import AnswerParser, JsonCalls, Malformed, Steps, ToolParser


class HermesParser(JsonCalls):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen, the demo model."""

    markers = ("<tool_call>",)
    control_tokens = ("<tool_call>", "</tool_call>")

    def _calls(self, marker: str) -> Steps[None]:
        yield from self._space()
        while True:
            self._after_call = False
            try:
                yield from self._call_object()
            except Malformed:
                # A forgotten last brace does no harm.
                if not self._after_call or self._text[self._mark : self._at].strip():
                    raise
            yield from self._space()
            if (yield from self._peek()) != "{":
                break
        yield from self._close("</tool_call>")


class Llama3JsonParser(JsonCalls):
    """`{"name": …, "parameters": {…}}`, several separated by `;`, `<|python_tag|>` before or not.

    Without that tag only an offered tool's name makes an object a call: JSON is a usual answer.
    """

    markers = ("<|python_tag|>", "{")
    control_tokens = ("<|python_tag|>",)

    def _calls(self, marker: str) -> Steps[None]:
        bare = marker == "{"
        if bare:
            self._at -= 1
        while True:
            yield from self._space()
            yield from self._call_object(bare=bare)
            yield from self._space()
            if not (yield from self._literal(";")):
                break


class MistralParser(JsonCalls):
    """`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and since 2025 for each call
    `[TOOL_CALLS]name{…}` or `[TOOL_CALLS]name[CALL_ID]…[ARGS]{…}`."""

    markers = ("[TOOL_CALLS]",)
    control_tokens = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")

    def new_id(self) -> str:
        """Nine letters and digits, which is all that these models' templates take."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def _calls(self, marker: str) -> Steps[None]:
        yield from self._space()
        if not (yield from self._literal("[")):
            yield from self._named_call()
            return
        while True:
            yield from self._space()
            yield from self._call_object()
            yield from self._space()
            if not (yield from self._literal(",")):
                break
        yield from self._close("]")

    def _named_call(self) -> Steps[None]:
        name = yield from self._name()
        yield from self._space()
        if (yield from self._literal("[CALL_ID]")):
            yield from self._name()
        if (yield from self._literal("[ARGS]")):
            yield from self._space()
        if (yield from self._peek()) != "{":
            raise Malformed
        self._begin_call(name)
        yield from self._json(tell=True)
        self._settle()


class DeepSeekV3Parser(ToolParser):
    """`<｜tool▁calls▁begin｜>` and for each call, between its own pair of tags,
    `function<｜tool▁sep｜>name` with the arguments in a block of code (V3, R1), or
    `name<｜tool▁sep｜>{…}` (V3.1)."""

    _CALL, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    _SEPARATOR, _END = "<｜tool▁sep｜>", "<｜tool▁calls▁end｜>"
    markers = ("<｜tool▁calls▁begin｜>",)
    control_tokens = (*markers, _CALL, _CALL_END, _SEPARATOR, _END)

    def _calls(self, marker: str) -> Steps[None]:
        yield from self._space()
        yield from self._expect(self._CALL)
        while True:
            yield from self._call()
            yield from self._space()
            if not (yield from self._literal(self._CALL)):
                break
        yield from self._close(self._END)

    def _call(self) -> Steps[None]:
        name = yield from self._name()
        yield from self._expect(self._SEPARATOR)
        in_block = (yield from self._peek()) != "{"
        if in_block:
            if name != "function":
                raise Malformed
            name = yield from self._name()
            yield from self._space()
            yield from self._expect("```json")
            yield from self._space()
            if (yield from self._peek()) != "{":
                raise Malformed
        self._begin_call(name)
        yield from self._json(tell=True)
        self._settle()
        if in_block:
            yield from self._close("```")
        yield from self._close(self._CALL_END)


class PythonicParser(ToolParser):
    """`[f(a=1, b="x"), g()]`: Llama 4 and others, within `<|python_start|>` tags or not.

    Without the tag only an offered tool's name makes a list a call. Values are literals, read by
    `ast` and never evaluated; JSON's true, false and null are understood. A call is told when its
    last parenthesis and what follows that have come.
    """

    markers = ("<|python_start|>", "[")
    control_tokens = ("<|python_start|>", "<|python_end|>")

    def _calls(self, marker: str) -> Steps[None]:
        bare = marker == "["
        if not bare:
            yield from self._space()
            yield from self._expect("[")
        yield from self._space()
        while True:
            name = yield from self._name()
            if not name or (bare and name not in self._tool_names):
                raise Malformed
            arguments = _arguments_as_json((yield from self._parenthesised()))
            yield from self._space()
            last = yield from self._literal("]")
            if not last:
                yield from self._expect(",")
                yield from self._space()
                last = yield from self._literal("]")
            self._begin_call(name)
            self._arguments(arguments)
            self._settle()
            if last:
                break
        if not bare:
            yield from self._close("<|python_end|>")

    def _parenthesised(self) -> Steps[str]:
        """The text from "(" to its ")", both included."""
        start = self._at - self._mark
        if (yield from self._peek()) != "(":
            raise Malformed
        depth = 0
        while True:
            char = yield from self._peek()
            if char in ("'", '"'):
                yield from self._quoted(char)
                continue
            if not char or char == "#":  # a comment could hide anything
                raise Malformed
            self._at += 1
            depth += (char in "([{") - (char in ")]}")
            if depth == 0:
                return self._text[self._mark + start : self._at]

    def _quoted(self, quote: str) -> Steps[None]:
        if (yield from self._literal(quote * 3)):
            quote *= 3
        else:
            self._at += 1
        while not (yield from self._literal(quote)):
            char = yield from self._peek()
            if char == "\\":
                self._at += 1
                char = yield from self._peek()
            if not char:
                raise Malformed
            self._at += 1


def _arguments_as_json(parenthesised: str) -> str:
    """`(a=1, b="x")` as JSON text. Raises Malformed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about escapes such as "\d"
            call = ast.parse("_" + parenthesised, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise Malformed
        arguments = {
            str(keyword.arg): ast.literal_eval(_JsonNames().visit(keyword.value))
            for keyword in call.keywords
            if keyword.arg is not None
        }
        if len(arguments) < len(call.keywords):  # `**more`, or a name twice
            raise Malformed
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise Malformed from error
    return text


class _JsonNames(ast.NodeTransformer):
    """`true`, `false` and `null` become Python's."""

    _VALUES = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self._VALUES[node.id]) if node.id in self._VALUES else node


TOOL_PARSERS: dict[str, type[AnswerParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "pythonic": PythonicParser,
    "mistral": MistralParser,
    "deepseek_v3": DeepSeekV3Parser,
    "openai": HarmonyParser,
}


def detect_tool_parser(template: str) -> str | None:
    """The name of the format that a model's chat template speaks of, None for none of these."""
    if CHANNEL in template:
        return "openai"
    if "<tool_call>" in template and "<function=" not in template:  # the latter is Qwen3-Coder's
        return "hermes"
    for name, sign in (
        ("deepseek_v3", DeepSeekV3Parser.markers[0]),
        ("mistral", "[TOOL_CALLS]"),
        ("pythonic", "<|python_start|>"),
        ("llama3_json", "<|python_tag|>"),
    ):
        if sign in template:
            return name
    # Llama 3.2 has no tag.
    in_json = '{"name": ' in template and '"parameters": ' in template
    return "llama3_json" if in_json and "<|start_header_id|>" in template else None
