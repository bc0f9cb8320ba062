"""Converts a conversation, its tools and its settings to the token ids of a prompt."""

from __future__ import annotations

from typing import Any

from ...engine.errors import InvalidRequestError
from ..parsing.message_parser import MessageFormat
from ..text.tokenizer import Tokenizer
from .protocol import ChatFields, Message
from .state import ServerState
from .tool_choice import check_tools, offered_tools

_EFFORT_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which chat templates turn reasoning on and off."""
EFFORT_VARIABLES = frozenset({*_EFFORT_SWITCHES, "reasoning_effort"})
"""Variables of chat templates that depend on `reasoning_effort`."""


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
        if message.says_nothing:
            raise InvalidRequestError(
                f"messages[{index}]: content is missing", f"messages[{index}].content"
            )
    check_tools(body, state.message_format)


async def encode_chat(
    state: ServerState, body: ChatFields, add_special_tokens: bool | None, max_tokens: int | None
) -> list[int]:
    """Return the token ids of a chat. Raises InvalidRequestError and ContextLengthError."""
    message_format = state.message_format
    if body.add_generation_prompt is None:
        add_generation_prompt = not body.continue_final_message
    else:
        add_generation_prompt = body.add_generation_prompt
    tools = offered_tools(body)
    if message_format.is_harmony:
        for tool in tools:  # gpt-oss's template fails without a description
            tool["function"].setdefault("description", "")
    return await state.tokenizer.encode_chat(
        [_template_message(message, message_format) for message in body.messages],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(add_special_tokens),
        documents=body.documents,
        tools=tools or None,
        template=body.chat_template,
        template_kwargs=await _template_settings(body, state.tokenizer, message_format),
        max_tokens=max_tokens,
    )


async def _template_settings(
    body: ChatFields, tokenizer: Tokenizer, message_format: MessageFormat
) -> dict[str, Any]:
    """Return chat_template_kwargs, with `reasoning_effort` under the names that the template knows.

    Raises InvalidRequestError if the template knows none of them, except for an effort of "none"
    with a model that does not reason.
    """
    settings = dict(body.chat_template_kwargs or {})
    effort = body.reasoning_effort
    if effort is None:
        return settings
    known = await tokenizer.template_variables(body.chat_template)
    wanted: dict[str, Any] = {name: effort != "none" for name in _EFFORT_SWITCHES}
    wanted["reasoning_effort"] = effort
    understood = {name: value for name, value in wanted.items() if name in known}
    reasons = message_format.reasoning is not None
    if not understood and (effort != "none" or reasons):
        raise InvalidRequestError(
            "the model's chat template has no setting for reasoning_effort", "reasoning_effort"
        )
    return {**understood, **settings}


def _template_message(message: Message, message_format: MessageFormat) -> dict[str, Any]:
    """Return the message in the form that chat templates read."""
    fields: dict[str, Any] = message.model_dump(exclude_none=True)
    for name in message.model_extra or ():
        fields.pop(name, None)
    for call in fields.get("tool_calls", ()):
        call.pop("index", None)
    refusal = fields.pop("refusal", "")
    fields["content"] = fields.get("content") or refusal
    reasoning = fields.pop("reasoning", None)
    if reasoning is not None:
        fields.setdefault("reasoning_content", reasoning)
    if message_format.is_harmony and "reasoning_content" in fields:
        # gpt-oss's template calls it `thinking`, and refuses it beside both content and calls.
        thinking = fields.pop("reasoning_content")
        if not (fields["content"] and fields.get("tool_calls")):
            fields["thinking"] = thinking
    return fields
