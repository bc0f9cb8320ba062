"""Formats in which each argument stands between tags of its own: Qwen3-Coder, GLM, MiniMax M2."""

from __future__ import annotations

from ..answer_parser import Malformed, Reader
from ..call_shape import CallShape, ParameterShape
from ..parameter_calls import ParameterCalls, ParameterTags
from ..tool_format import ToolFormat


class Qwen3CoderParser(ParameterCalls):
    """Reads `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`.

    A model may forget the outer tags; then the function must be one that is offered.
    """

    tags = {"<tool_call>": "</tool_call>"}
    """The outer tags."""
    markers = ("<tool_call>", "<function=")
    bare_markers = ("<function=",)
    control_tokens = ("<tool_call>", "</tool_call>")
    parameter = ParameterTags("<parameter=", (">",), "</parameter>", trim=True)

    def _calls(self, marker: str) -> Reader[None]:
        bare = marker in self.bare_markers
        [closing] = self.tags.values()
        ended = False
        while not ended:
            if not bare:
                yield from self._skip_space()
                yield from self._expect("<function=")
            name = (yield from self._until(">")).strip()
            if bare and name not in self._tools:
                raise Malformed
            yield from self._parameters(name, "</function>")
            yield from self._skip_space()
            # A closing tag may be there even if the opening one is not.
            ended = bool((yield from self._take_last(closing)) or bare)
        self._end_call()


class SeedOssParser(Qwen3CoderParser):
    """Reads the same within `<seed:tool_call>`, with values on the line of their tags: Seed-OSS."""

    tags = {"<seed:tool_call>": "</seed:tool_call>"}
    markers = ("<seed:tool_call>", "<function=")
    control_tokens = ("<seed:tool_call>", "</seed:tool_call>")
    parameter = ParameterTags("<parameter=", (">",), "</parameter>", trim=False)


class GlmParser(ParameterCalls):
    """Reads `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`, with
    or without line breaks between the tags: GLM 4.5 and later."""

    markers = ("<tool_call>",)
    control_tokens = (
        *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"),
        *("<arg_value>", "</arg_value>"),
    )
    parameter = ParameterTags("<arg_key>", ("</arg_key>", "<arg_value>"), "</arg_value>", False)

    def _calls(self, marker: str) -> Reader[None]:
        yield from self._skip_space()
        name = yield from self._name()
        yield from self._parameters(name, "</tool_call>")


class MiniMaxM2Parser(ParameterCalls):
    """Reads `<minimax:tool_call><invoke name="name"><parameter name="key">value</parameter>
    </invoke></minimax:tool_call>`, with one or more calls: MiniMax M2."""

    markers = ("<minimax:tool_call>",)
    control_tokens = ("<minimax:tool_call>", "</minimax:tool_call>")
    parameter = ParameterTags('<parameter name="', ('">',), "</parameter>", trim=False)

    def _calls(self, marker: str) -> Reader[None]:
        yield from self._skip_space()
        yield from self._expect('<invoke name="')
        while True:
            name = yield from self._until('">')
            yield from self._parameters(name, "</invoke>")
            yield from self._skip_space()
            if not (yield from self._take('<invoke name="')):
                break
        yield from self._close("</minimax:tool_call>")


def _qwen3_coder(template: str) -> CallShape:
    before, after = "<tool_call>\n<function=", "</function>\n</tool_call>"
    text = ("", "</parameter>", "\n")
    parameter = ParameterShape("<parameter=", ">\n", "\n</parameter>\n", text=text)
    return CallShape("", before, ">\n", after, "\n", "", parameter)


def _seed_oss(template: str) -> CallShape:
    before, after = "<seed:tool_call>\n<function=", "</function>\n</seed:tool_call>"
    text = ("", "</parameter>", "\n")
    parameter = ParameterShape("<parameter=", ">", "</parameter>\n", text=text)
    return CallShape("", before, ">\n", after, "\n", "", parameter)


def _glm(template: str) -> CallShape:
    # GLM 4.5's template writes line breaks between the tags, that of GLM 4.7 none.
    end = "" if "</arg_key><arg_value>" in template else "\n"
    parameter = ParameterShape(
        "<arg_key>",
        f"</arg_key>{end}<arg_value>",
        f"</arg_value>{end}",
        text=("", "</arg_value>", end),
    )
    return CallShape("", "<tool_call>", end, "</tool_call>", "\n", "", parameter)


def _minimax_m2(template: str) -> CallShape:
    parameter = ParameterShape(
        '<parameter name="', '">', "</parameter>\n", text=("", "</parameter>", "\n")
    )
    first, last = "<minimax:tool_call>\n", "</minimax:tool_call>"
    return CallShape(first, '<invoke name="', '">\n', "</invoke>\n", "", last, parameter)


FORMATS = (
    ToolFormat("minimax_m2", MiniMaxM2Parser, _minimax_m2, signs=(("<minimax:tool_call>",),)),
    ToolFormat("glm45", GlmParser, _glm, signs=(("<arg_key>",),), aliases=("glm47",)),
    ToolFormat("seed_oss", SeedOssParser, _seed_oss, signs=(("<seed:tool_call>",),)),
    ToolFormat(
        "qwen3_coder",
        Qwen3CoderParser,
        _qwen3_coder,
        signs=(("<function=", "<parameter="),),
        aliases=("qwen3_xml", "mimo"),
    ),
)
