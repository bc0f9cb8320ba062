"""The request bodies, as strict pydantic models: no coercion, null means "left out".

Bounds that belong to sampling live in engine/sampling_params.py; here stands what JSON may look
like. Unknown fields are kept by pydantic and reported by `validate`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)

from ...engine.errors import InvalidRequestError
from ...engine.sampling_params import MAX_LOGIT_BIAS
from ..parsing.answer_parser import TOOL_NAME
from .tool_choice import MAX_TOOLS, check_parameters, check_tool_choice, check_unique
from .unsupported import refuse_unsupported

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 256  # characters
MAX_MESSAGES = 4096
MAX_DETOKENIZE = 262_144
MAX_LABEL_LENGTH = 128  # of cache_salt, user and request_id, in characters


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
        raise ValueError(f"each string must have 1 to {MAX_BAD_WORD_LENGTH} characters, not spaces")
    return value


def _check_early_stopping(value: Any) -> Any:
    if value is None or isinstance(value, bool) or value == "never":
        return value
    raise ValueError('must be true, false or "never"')


def _check_no_suffix(value: Any) -> Any:
    if value not in (None, ""):
        raise ValueError("a chat has none; /v1/completions fills in the middle")
    return value


def _check_content(value: Any) -> str | None:
    """Text, or text parts joined by newlines; nothing else is fetched or shown to the model."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ValueError("must be a string or a list of content parts")
    for part in value:
        if part.get("type") != "text":
            raise ValueError(f"content of type {str(part.get('type'))[:32]!r} is not supported")
        if not isinstance(part.get("text"), str):
            raise ValueError("a text part needs a string as its text")
    return "\n".join(part["text"] for part in value)


def _check_bias(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"has more than {MAX_LOGIT_BIAS} entries")
    return value


class TextPart(BaseModel):
    """A part of a message's content, in the description of the API."""

    type: Literal["text"]
    text: str


# Without fail-fast, a million wrong items would make a million error reports.
TokenIds = Annotated[list[int], Field(fail_fast=True)]
ToolName = Annotated[str, Field(pattern=f"^(?:{TOOL_NAME.pattern})$")]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Label = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_LENGTH)]
Prompt = Annotated[
    Any,
    PlainValidator(
        _check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]
Content = Annotated[
    Any, PlainValidator(_check_content, json_schema_input_type=str | list[TextPart] | None)
]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(_Strict):
    """What completions and chat completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_check_bias)] = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[str], PlainValidator(_check_bad_words)] = []
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: Annotated[
        bool | Literal["never"] | None, PlainValidator(_check_early_stopping)
    ] = None
    seed: int | None = None
    ignore_eos: bool | None = None
    stop: Annotated[
        list[str], PlainValidator(_check_stop, json_schema_input_type=str | list[str] | None)
    ] = []
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    add_special_tokens: bool | None = None
    skip_special_tokens: bool | None = None
    # Fast tokenizers put no spaces between special tokens either way.
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Label | None = None
    request_id: Label | None = None
    user: Label | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None


class CompletionBody(GenerationBody):
    prompt: Prompt
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ToolCallFunction(_Strict):
    name: ToolName
    arguments: str = "{}"


class ToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: ToolCallFunction


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(_Strict):
    name: ToolName
    description: str | None = None
    parameters: Annotated[Any, PlainValidator(check_parameters)] = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: FunctionDefinition


Tools = Annotated[
    list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), AfterValidator(check_unique)
]


class ChatFields(_Strict):
    """What a chat template is rendered from."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    tools: Tools | None = None
    tool_choice: Annotated[Any, PlainValidator(check_tool_choice)] = None
    reasoning_effort: ReasoningEffort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatBody(ChatFields, GenerationBody):
    suffix: Annotated[str | None, PlainValidator(_check_no_suffix)] = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None


class TokenizeBody(_Strict):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatBody(ChatFields):
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Strict):
    model: str | None = None
    tokens: Annotated[list[int], Field(max_length=MAX_DETOKENIZE, fail_fast=True)]
    skip_special_tokens: bool | None = None


Body = TypeVar("Body", bound=BaseModel)


def validate(model: type[Body], fields: dict[str, Any], *, strict: bool) -> tuple[Body, list[str]]:
    """The typed body and its unknown fields. Raises InvalidRequestError naming the parameter:
    on a wrong type, on a feature that is known but not there, on an unknown field if `strict`."""
    return check_types(model, refuse_unsupported(fields), strict=strict)


def check_types(
    model: type[Body], fields: dict[str, Any], *, strict: bool, within: tuple[int | str, ...] = ()
) -> tuple[Body, list[str]]:
    """As `validate`, of fields of which all are served. `within` is the path that leads to them."""
    try:
        body = model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = path_of((*within, *first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidRequestError(f"{param}: {message}", param) from error
    ignored = list(_unknown(body, within))
    if ignored and strict:
        raise InvalidRequestError(f"unknown field {ignored[0]}", ignored[0])
    return body, ignored


_PLAIN_NAME = re.compile(r"[A-Za-z0-9_\-]{1,64}")


def path_of(loc: tuple[int | str, ...]) -> str:
    """The name of a field for a person; strange keys of clients are not repeated."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if _PLAIN_NAME.fullmatch(part) else "?"
            text += f".{name}" if text else name
    return text


def _unknown(body: BaseModel, prefix: tuple[int | str, ...] = ()) -> Iterator[str]:
    for name in body.model_extra or ():
        yield path_of((*prefix, name))
    for name in body.model_fields_set:
        value = getattr(body, name, None)
        if isinstance(value, BaseModel):
            yield from _unknown(value, (*prefix, name))
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for index, item in enumerate(value):
                yield from _unknown(item, (*prefix, name, index))
