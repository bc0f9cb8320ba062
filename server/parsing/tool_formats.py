"""The formats in which models write tool calls, under the names that vLLM gives them."""

from __future__ import annotations

import ast
import json
import secrets
import string
import warnings

from .answer_parser import AnswerParser, Malformed, Reader
from .harmony import CHANNEL, HarmonyParser
from .tool_parsers import JsonCalls, ToolParser


class HermesParser(JsonCalls):
    """Reads `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen, the demo model.

    Several objects may follow each other between one pair of tags.
    """

    markers = ("<tool_call>",)
    control_tokens = ("<tool_call>", "</tool_call>")

    def _calls(self, marker: str) -> Reader[None]:
        yield from self._skip_space()
        while True:
            self._after_call = False
            try:
                yield from self._call_object()
            except Malformed:
                # A model may forget the last brace. Accept the call if its arguments are complete
                # and only white space was read after them.
                if not self._after_call or self._text[self._mark : self._at].strip():
                    raise
            yield from self._skip_space()
            if (yield from self._peek()) != "{":
                break
        yield from self._close("</tool_call>")


class Llama3JsonParser(JsonCalls):
    """Reads `{"name": …, "parameters": {…}}`, several separated by `;`.

    `<|python_tag|>` may come before them. Without that tag an object is a call only if it names an
    offered tool, because a model may well answer in JSON.
    """

    markers = ("<|python_tag|>", "{")
    control_tokens = ("<|python_tag|>",)

    def _calls(self, marker: str) -> Reader[None]:
        bare = marker == "{"
        if bare:
            self._at -= 1  # the marker is the object's own brace
        while True:
            yield from self._skip_space()
            yield from self._call_object(bare=bare)
            yield from self._skip_space()
            if not (yield from self._take(";")):
                break


class MistralParser(JsonCalls):
    """Reads `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and the formats since 2025, in which
    each call is `[TOOL_CALLS]name{…}` or `[TOOL_CALLS]name[CALL_ID]…[ARGS]{…}`."""

    markers = ("[TOOL_CALLS]",)
    control_tokens = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")

    def new_id(self) -> str:
        """Return nine letters and digits, the only form that these models' templates accept."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def _calls(self, marker: str) -> Reader[None]:
        yield from self._skip_space()
        if not (yield from self._take("[")):
            yield from self._named_call()
            return
        while True:
            yield from self._skip_space()
            yield from self._call_object()
            yield from self._skip_space()
            if not (yield from self._take(",")):
                break
        yield from self._close("]")

    def _named_call(self) -> Reader[None]:
        name = yield from self._name()
        yield from self._skip_space()
        if (yield from self._take("[CALL_ID]")):
            yield from self._name()  # the model's own id, which is replaced by ours
        if (yield from self._take("[ARGS]")):
            yield from self._skip_space()
        if (yield from self._peek()) != "{":
            raise Malformed
        self._begin_call(name)
        yield from self._stream_arguments()
        self._end_call()


class DeepSeekV3Parser(ToolParser):
    """Reads the calls after `<｜tool▁calls▁begin｜>`, each between its own pair of tags.

    A call is `function<｜tool▁sep｜>name` and the arguments in a block of code (V3, R1), or
    `name<｜tool▁sep｜>{…}` (V3.1).
    """

    _CALL, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    _SEPARATOR, _END = "<｜tool▁sep｜>", "<｜tool▁calls▁end｜>"
    markers = ("<｜tool▁calls▁begin｜>",)
    control_tokens = (*markers, _CALL, _CALL_END, _SEPARATOR, _END)

    def _calls(self, marker: str) -> Reader[None]:
        yield from self._skip_space()
        yield from self._expect(self._CALL)
        while True:
            yield from self._call()
            yield from self._skip_space()
            if not (yield from self._take(self._CALL)):
                break
        yield from self._close(self._END)

    def _call(self) -> Reader[None]:
        name = yield from self._name()
        yield from self._expect(self._SEPARATOR)
        in_block = (yield from self._peek()) != "{"
        if in_block:
            if name != "function":
                raise Malformed
            name = yield from self._name()
            yield from self._skip_space()
            yield from self._expect("```json")
            yield from self._skip_space()
            if (yield from self._peek()) != "{":
                raise Malformed
        self._begin_call(name)
        yield from self._stream_arguments()
        self._end_call()
        if in_block:
            yield from self._close("```")
        yield from self._close(self._CALL_END)


class PythonicParser(ToolParser):
    """Reads `[f(a=1, b="x"), g()]`: Llama 4 and others, with or without `<|python_start|>` tags.

    Without the tag a list is a call only if it names an offered tool. Values are literals: `ast`
    parses them, and nothing is evaluated. JSON's true, false and null are accepted too. Arguments
    are not streamed; a call is emitted once its last parenthesis and what must follow have come.
    """

    markers = ("<|python_start|>", "[")
    control_tokens = ("<|python_start|>", "<|python_end|>")

    def _calls(self, marker: str) -> Reader[None]:
        bare = marker == "["
        if not bare:
            yield from self._skip_space()
            yield from self._expect("[")
        yield from self._skip_space()
        while True:
            # 1. Read `name(…)`.
            name = yield from self._name()
            if not name or (bare and name not in self._tool_names):
                raise Malformed
            arguments = _arguments_as_json((yield from self._parenthesised()))
            # 2. Read what must follow, a comma or the end of the list; a comma may come last. Until
            #    then the text could still be an ordinary list.
            yield from self._skip_space()
            last = yield from self._take("]")
            if not last:
                yield from self._expect(",")
                yield from self._skip_space()
                last = yield from self._take("]")
            # 3. Emit the call.
            self._begin_call(name)
            self._emit_arguments(arguments)
            self._end_call()
            if last:
                break
        if not bare:
            yield from self._close("<|python_end|>")

    def _parenthesised(self) -> Reader[str]:
        """Take the text from "(" to the ")" that matches it, and return it with both."""
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

    def _quoted(self, quote: str) -> Reader[None]:
        """Take a Python string that begins with `quote`, or with three of them."""
        if (yield from self._take(quote * 3)):
            quote *= 3
        else:
            self._at += 1
        while not (yield from self._take(quote)):
            char = yield from self._peek()
            if char == "\\":
                self._at += 1
                char = yield from self._peek()
            if not char:
                raise Malformed
            self._at += 1


def _arguments_as_json(parenthesised: str) -> str:
    """Return the JSON text of keyword arguments, `(a=1, b="x")`. Raises Malformed."""
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
    """Replaces the names `true`, `false` and `null` by Python's constants."""

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
"""Parser by the value of --tool-call-parser."""


def detect_tool_parser(template: str) -> str | None:
    """Return the name of the format that a chat template mentions, or None if it mentions none."""
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
    # Llama 3.2 has no tag, but its template shows the object to write.
    in_json = '{"name": ' in template and '"parameters": ' in template
    return "llama3_json" if in_json and "<|start_header_id|>" in template else None
