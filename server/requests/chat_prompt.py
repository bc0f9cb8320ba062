"""Converts a conversation, its tools and its settings to the token ids of a prompt."""

from __future__ import annotations

from typing import Any

from ...engine.errors import InvalidRequestError
from ..parsing.formats.message_format import MessageFormat
from ..templates.chat_template import RESERVED_NAMES
from ..templates.generic_tools import with_tools_as_text
from ..text.tokenizer import ChatPrompt, Tokenizer
from ..validation import path_of
from .field_types import parts_of
from .protocol import ChatFields, Message
from .state import ServerState
from .tool_choice import check_tools, in_todays_form, offered_tools

_EFFORT_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which chat templates turn reasoning on and off."""


def check_chat(state: ServerState, body: ChatFields) -> None:
    """Raise InvalidRequestError for fields that contradict each other or are not allowed."""
    if body.chat_template is not None and not state.settings.trust_request_chat_template:
        raise InvalidRequestError(
            "a chat_template in a request is not accepted by this server", "chat_template"
        )
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message cannot be combined with add_generation_prompt",
                "continue_final_message",
            )
        if body.messages[-1].role != "assistant" or not body.messages[-1].content:
            raise InvalidRequestError(
                "continue_final_message needs a last message with text from the assistant",
                "continue_final_message",
            )
    for index, message in enumerate(body.messages):
        for number, call in enumerate(message.tool_calls or ()):
            if getattr(call, call.type) is None:
                param = f"messages[{index}].tool_calls[{number}].{call.type}"
                raise InvalidRequestError(f"{param}: is missing", param)
        if message.says_nothing:
            raise InvalidRequestError(
                f"messages[{index}]: content is missing", f"messages[{index}].content"
            )
    check_tools(body, state.message_format)


async def encode_chat(
    state: ServerState, body: ChatFields, add_special_tokens: bool | None, max_tokens: int | None
) -> ChatPrompt:
    """Return the prompt of a chat. Raises InvalidRequestError and ContextLengthError."""
    message_format = state.message_format
    if body.add_generation_prompt is None:
        add_generation_prompt = not body.continue_final_message
    else:
        add_generation_prompt = body.add_generation_prompt
    tools = offered_tools(body)
    messages = [_template_message(message) for message in in_todays_form(body.messages)]
    if message_format.is_generic:
        has_system = await state.tokenizer.renders_system(body.chat_template)
        messages = with_tools_as_text(messages, tools, has_system=has_system)
        tools = []
    return await state.tokenizer.encode_chat(
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(add_special_tokens),
        documents=body.documents,
        tools=tools or None,
        template=body.chat_template,
        template_kwargs=await _template_settings(body, state.tokenizer, message_format),
        max_tokens=max_tokens,
    )


async def settings_without_effect(state: ServerState, body: ChatFields) -> list[str]:
    """Return the paths of the fields that ask for a setting which the model's chat template does
    not have. Raises InvalidRequestError if there is no template."""
    return (await _read_settings(body, state.tokenizer, state.message_format))[1]


async def _template_settings(
    body: ChatFields, tokenizer: Tokenizer, message_format: MessageFormat
) -> dict[str, Any]:
    """Return the variables that the body sets in the chat template."""
    return (await _read_settings(body, tokenizer, message_format))[0]


async def _read_settings(
    body: ChatFields, tokenizer: Tokenizer, message_format: MessageFormat
) -> tuple[dict[str, Any], list[str]]:
    """Return the variables that the body sets in the chat template, and the paths of the fields
    for which the template has none.

    chat_template_kwargs go before enable_thinking, which goes before reasoning_effort. An effort of
    "none" with a model that does not reason asks for nothing.
    """
    effort, thinks = body.reasoning_effort, body.enable_thinking
    given = body.chat_template_kwargs or {}
    if effort is None and thinks is None and not given:
        return {}, []
    known = await tokenizer.template_variables(body.chat_template)
    settings: dict[str, Any] = {}
    ignored = []
    reasons = message_format.reasoning is not None
    # 1. The effort, under each name that the template knows.
    if effort is not None:
        wanted = {**dict.fromkeys(_EFFORT_SWITCHES, effort != "none"), "reasoning_effort": effort}
        settings = {name: value for name, value in wanted.items() if name in known}
        if not settings and (effort != "none" or reasons):
            ignored.append("reasoning_effort")
    # 2. The switch, which has the last word on what it switches.
    if thinks is not None:
        switches = {name: thinks for name in _EFFORT_SWITCHES if name in known}
        settings |= switches
        if not switches and (thinks or reasons):
            ignored.append("enable_thinking")
    # 3. The template's own variables. Names that are arguments of the library are refused later.
    for name, value in given.items():
        if name in known or name in RESERVED_NAMES:
            settings[name] = value
        else:
            ignored.append(path_of(("chat_template_kwargs", name)))
    return settings, ignored


def _template_message(message: Message) -> dict[str, Any]:
    """Return the message for `Tokenizer.encode_chat`. Raises InvalidRequestError."""
    fields: dict[str, Any] = message.model_dump(exclude_none=True)
    for name in message.model_extra or ():
        fields.pop(name, None)
    refusal = fields.pop("refusal", None)
    content = message.content or refusal
    fields["content"] = parts_of(content) if content else ""
    reasoning = fields.pop("reasoning", None)
    if reasoning is not None:
        fields.setdefault("reasoning_content", reasoning)
    for call in fields.get("tool_calls", ()):
        call.pop("index", None)
    return fields
