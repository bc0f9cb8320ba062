"""The request bodies as strict pydantic models, and their validation.

null means the same as a field that is left out. The fields' types are in field_types.py, and the
bounds of sampling parameters in engine/sampling_params.py. The docstrings of the models appear in
the OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from ...engine.errors import InvalidRequestError
from ..validation import MAX_LISTED, explain
from ..validation import path_of as path_of
from .field_types import (
    BadWords,
    Content,
    EarlyStopping,
    Fields,
    FunctionCallField,
    Label,
    LogitBias,
    NoBudget,
    NoSuffix,
    OptionalLabel,
    Priority,
    Prompt,
    ReasoningEffort,
    Seconds,
    StopStrings,
    TextPart,
    TokenIds,
    ToolChoiceField,
    ToolName,
    ToolParameters,
)
from .unsupported import refuse_unsupported, take_hints

MAX_MESSAGES = 4096
"""Maximum messages of a chat."""
MAX_TOOLS = 1024
"""Maximum tools of a chat."""
MAX_DETOKENIZE = 262_144
"""Maximum token ids of POST /detokenize."""


class StreamOptions(Fields):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Fields):
    """The fields that completions and chat completions share."""

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
    logit_bias: LogitBias = None
    allowed_token_ids: TokenIds | None = None
    bad_words: BadWords = []
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping = None
    seed: int | None = None
    ignore_eos: bool | None = None
    stop: StopStrings = []
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    logprob_token_ids: TokenIds | None = None
    prompt_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    add_special_tokens: bool | None = None
    skip_special_tokens: bool | None = None
    # Accepted without effect: fast tokenizers put no spaces between special tokens either way.
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    priority: Priority | None = None
    cache_salt: Label | None = None
    request_id: Label | None = None
    user: OptionalLabel = None
    timeout: Seconds | None = None


class CompletionBody(GenerationBody):
    """One or more prompts to continue."""

    prompt: Prompt
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    thinking_token_budget: NoBudget = None


class ToolCallFunction(Fields):
    """The called function, with its arguments as a JSON text."""

    name: ToolName
    arguments: str = "{}"


class CustomCall(Fields):
    """The called custom tool, with its input."""

    name: ToolName
    input: str


class ToolCall(Fields):
    """A tool call that the assistant made in an earlier turn: of a function or of a custom tool."""

    index: int | None = None
    id: str
    type: Literal["function", "custom"] = "function"
    function: ToolCallFunction | None = None
    custom: CustomCall | None = None


class Message(Fields):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: ToolCallFunction | None = None
    refusal: str | None = None

    @property
    def says_nothing(self) -> bool:
        """Whether the message has no content where it needs some: an assistant may have called a
        tool or only reasoned."""
        if self.content is not None:
            return False
        called = self.tool_calls or self.function_call
        spoken = called or self.reasoning or self.reasoning_content or self.refusal
        return not (self.role == "assistant" and spoken)


class FunctionDefinition(Fields):
    """A function that the model may call, with the JSON schema of its arguments."""

    name: ToolName
    description: str | None = None
    parameters: ToolParameters = None
    strict: bool | None = None


class CustomFormat(Fields):
    """The form of a custom tool's input."""

    type: Literal["text"] = "text"


class CustomDefinition(Fields):
    """A tool that takes a text."""

    name: ToolName
    description: str | None = None
    format: CustomFormat | None = None


class Tool(Fields):
    """A tool that the model may call: a function or a custom tool."""

    type: Literal["function", "custom"] = "function"
    function: FunctionDefinition | None = None
    custom: CustomDefinition | None = None


def _check_unique(
    tools: list[Tool] | list[FunctionDefinition],
) -> list[Tool] | list[FunctionDefinition]:
    names: set[str] = set()
    for tool in tools:
        one = (tool.custom or tool.function) if isinstance(tool, Tool) else tool
        if one is not None and one.name in names:
            raise ValueError(f"two tools have the name {one.name!r}")
        names |= set() if one is None else {one.name}
    return tools


Tools = Annotated[
    list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), AfterValidator(_check_unique)
]


Functions = Annotated[
    list[FunctionDefinition],
    Field(max_length=MAX_TOOLS, fail_fast=True),
    AfterValidator(_check_unique),
]


class ChatFields(Fields):
    """The fields from which a chat template makes the prompt."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    tools: Tools | None = None
    tool_choice: ToolChoiceField = None
    functions: Functions | None = None
    function_call: FunctionCallField = None
    reasoning_effort: ReasoningEffort | None = None
    enable_thinking: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Prediction(Fields):
    """What the client expects as the answer."""

    type: Literal["content"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The text, whose parts follow each other without anything between them."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(ChatFields, GenerationBody):
    """A conversation to answer."""

    suffix: NoSuffix = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    prediction: Prediction | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class TokenizeBody(Fields):
    """A prompt to tokenise."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatBody(ChatFields):
    """A conversation to tokenise."""

    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Fields):
    """Token ids to convert to text."""

    model: str | None = None
    tokens: Annotated[list[int], Field(max_length=MAX_DETOKENIZE, fail_fast=True)]
    skip_special_tokens: bool | None = None


Body = TypeVar("Body", bound=BaseModel)


def validate(model: type[Body], fields: dict[str, Any], *, strict: bool) -> tuple[Body, list[str]]:
    """Return the typed body and the names of the fields without effect: unknown ones, and hints.

    Raises InvalidRequestError naming the parameter, for a wrong type, for a feature that is known
    but not supported and, if `strict`, for a field without effect.
    """
    fields, hints = take_hints(refuse_unsupported(fields), strict=strict)
    body, ignored = check_types(model, fields, strict=strict)
    return body, ignored + hints


def check_types(
    model: type[Body], fields: dict[str, Any], *, strict: bool, within: tuple[int | str, ...] = ()
) -> tuple[Body, list[str]]:
    """Do as `validate`, but without looking for unsupported features. `within` is the path that
    leads to `fields` in the body."""
    try:
        body = model.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequestError(*explain(error, fields, within)) from error
    ignored = list(_unknown(body, within))
    if ignored and strict:
        names = ", ".join(ignored[:MAX_LISTED])
        kind = "field" if len(ignored) == 1 else "fields"
        raise InvalidRequestError(f"unknown {kind} {names}", ignored[0])
    return body, ignored


def _unknown(body: BaseModel, prefix: tuple[int | str, ...] = ()) -> Iterator[str]:
    """Yield the paths of the unknown fields of `body` and of the models in it."""
    for name, value in (body.model_extra or {}).items():
        if value is not None:
            yield path_of((*prefix, name))
    for name in body.model_fields_set:
        value = getattr(body, name, None)
        if isinstance(value, BaseModel):
            yield from _unknown(value, (*prefix, name))
        elif isinstance(value, list) and not isinstance(next(iter(value), None), int):
            for index, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _unknown(item, (*prefix, name, index))
