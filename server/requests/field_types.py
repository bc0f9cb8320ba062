"""Types of single fields in request bodies, with the checks that JSON types do not express.

The bounds of sampling parameters are not here but in engine/sampling_params.py. A check raises
ValueError, from which `protocol.validate` makes an error that names the field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
)

from ...engine.sampling_params import MAX_LOGIT_BIAS
from ..parsing.answer_parser import TOOL_NAME

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
"""Maximum characters of a stop string."""
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 256
"""Maximum characters of a bad word."""
MAX_LABEL_LENGTH = 128
"""Maximum characters of cache_salt, user and request_id."""


class Fields(BaseModel):
    """The base of all request bodies and of the objects in them.

    Types are strict: nothing is coerced. Unknown fields are kept, so that `protocol.check_types`
    can report them.
    """

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class NamedTool(NamedTuple):
    """A `tool_choice` of one tool, which the model must call."""

    name: str


class AllowedTools(NamedTuple):
    """A `tool_choice` that leaves only these tools to the model, which may or must call one."""

    mode: Literal["auto", "required"]
    names: tuple[str, ...]


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


# -- checks ----------------------------------------------------------------------------------


def _check_prompt(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        kinds = set(map(type, value))
        if kinds <= {str} or kinds == {int}:
            return value
        if kinds == {list} and all(set(map(type, ids)) <= {int} for ids in value):
            return value
    raise ValueError("must be a string, a list of strings, of token ids, or of lists of token ids")


class JoinedText(str):
    """The text of content parts, joined by line breaks. `parts` are the parts themselves, for chat
    templates that read them."""

    parts: tuple[str, ...]


def parts_of(content: str) -> str | list[dict[str, Any]]:
    """Return a message's content as chat templates take it: text, or the parts of which it was
    joined."""
    if not isinstance(content, JoinedText):
        return content
    return [{"type": "text", "text": text} for text in content.parts]


def _check_content(value: Any) -> str | None:
    """Return text, or the text parts as JoinedText. Other content is refused: nothing is
    fetched or shown to the model."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ValueError("must be a string or a list of content parts")
    for index, part in enumerate(value):
        kind = part.get("type", "text")
        if kind != "text":
            raise ValueError(f"part {index} has the type {str(kind)[:32]!r}; only text is read")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {index} needs a string as its text")
    texts = tuple(part["text"] for part in value)
    if len(texts) == 1:
        return texts[0]  # type: ignore[no-any-return]
    joined = JoinedText("\n".join(texts))
    joined.parts = texts
    return joined


def _check_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not set(map(type, stops)) <= {str}:
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"has more than {MAX_STOP_STRINGS} strings")
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"each string must have 1 to {MAX_STOP_LENGTH} characters")
    return stops


def _check_bad_words(value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not set(map(type, value)) <= {str}:
        raise ValueError("must be a list of strings")
    if len(value) > MAX_BAD_WORDS:
        raise ValueError(f"has more than {MAX_BAD_WORDS} strings")
    if not all(word.strip(" ") and len(word) <= MAX_BAD_WORD_LENGTH for word in value):
        raise ValueError(
            f"each string must have 1 to {MAX_BAD_WORD_LENGTH} characters, not only spaces"
        )
    return value


def _check_bias(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"has more than {MAX_LOGIT_BIAS} entries")
    return value


def _check_early_stopping(value: Any) -> Any:
    if value is None or isinstance(value, bool) or value == "never":
        return value
    raise ValueError('must be true, false or "never"')


def _check_no_suffix(value: Any) -> Any:
    if value not in (None, ""):
        raise ValueError("is not available in chats; /v1/completions fills in the middle")
    return value


def _check_parameters(value: Any) -> dict[str, Any] | None:
    """Check the JSON schema of a tool's arguments as far as chat templates rely on it."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("type", "object") != "object":
        raise ValueError('must be the JSON schema of an object, {"type": "object", …}')
    if not isinstance(value.get("properties", {}), dict):
        raise ValueError("its properties must be an object")
    return value


def _check_tool_name(value: str) -> str:
    if not TOOL_NAME.fullmatch(value):
        raise ValueError("must have 1 to 128 letters, digits or _ . : / -")
    return value


def _tool_name(value: Any) -> str | None:
    """Return the name in `{"type": "function", "function": {"name": …}}` or in the same with
    "custom" instead; None if the value is neither."""
    kind = value.get("type") if isinstance(value, dict) else None
    inner = value.get(kind) if kind in ("function", "custom") else None
    name = inner.get("name") if isinstance(inner, dict) else None
    complete = isinstance(name, str) and value == {"type": kind, kind: {"name": name}}
    return name if complete else None


def _check_tool_choice(value: Any) -> ToolChoice | None:
    if value is None or value in ("none", "auto", "required"):
        return value  # type: ignore[no-any-return]
    name = _tool_name(value)
    if name is not None:
        return NamedTool(name)
    allowed = value.get("allowed_tools") if isinstance(value, dict) else None
    if isinstance(allowed, dict) and value == {"type": "allowed_tools", "allowed_tools": allowed}:
        mode, tools = allowed.get("mode"), allowed.get("tools")
        names = [_tool_name(tool) for tool in tools] if isinstance(tools, list) else []
        if mode not in ("auto", "required") or not names or None in names or len(allowed) > 2:
            raise ValueError(
                'allowed_tools needs a mode, "auto" or "required", and a list of tools, each '
                '{"type": "function", "function": {"name": …}}'
            )
        return AllowedTools(mode, tuple(filter(None, names)))
    raise ValueError(
        'must be "none", "auto", "required", {"type": "function", "function": {"name": …}} or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}'
    )


def _check_function_call(value: Any) -> ToolChoice | None:
    if value is None or value in ("none", "auto"):
        return value  # type: ignore[no-any-return]
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or value != {"name": name}:
        raise ValueError('must be "none", "auto" or {"name": …}')
    return NamedTool(name)


def _check_label(value: Any) -> Any:
    """Read an empty label as one that is left out."""
    return None if value == "" else value


def _check_no_budget(value: Any) -> None:
    if value is not None:
        raise ValueError("is not available in completions, only in chats")


# -- types -----------------------------------------------------------------------------------

# Fail-fast: otherwise a million wrong items would make a million error reports.
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Label = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_LENGTH)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Seconds = Annotated[float, Field(gt=0)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Prompt = Annotated[
    Any,
    PlainValidator(
        _check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]
Content = Annotated[
    Any, PlainValidator(_check_content, json_schema_input_type=str | list[TextPart] | None)
]
StopStrings = Annotated[
    list[str], PlainValidator(_check_stop, json_schema_input_type=str | list[str] | None)
]
BadWords = Annotated[list[str], PlainValidator(_check_bad_words)]
LogitBias = Annotated[dict[str, float] | None, BeforeValidator(_check_bias)]
EarlyStopping = Annotated[bool | Literal["never"] | None, PlainValidator(_check_early_stopping)]
NoSuffix = Annotated[str | None, PlainValidator(_check_no_suffix)]
ToolName = Annotated[
    str,
    AfterValidator(_check_tool_name),
    Field(json_schema_extra={"pattern": f"^(?:{TOOL_NAME.pattern})$"}),
]
ToolParameters = Annotated[Any, PlainValidator(_check_parameters)]
FunctionCallField = Annotated[Any, PlainValidator(_check_function_call)]
OptionalLabel = Annotated[Label | None, BeforeValidator(_check_label)]
"""A label; clients send an empty one for none."""
NoBudget = Annotated[int | None, PlainValidator(_check_no_budget)]
ToolChoiceField = Annotated[Any, PlainValidator(_check_tool_choice)]
