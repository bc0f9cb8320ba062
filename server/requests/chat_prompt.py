"""A conversation, its tools and its settings to the token ids of a prompt."""

from __future__ import annotations

from typing import Any

from ...engine.errors import InvalidRequestError
from ..text.template_calls import parse_arguments
from .protocol import ChatFields, Message
from .state import ServerState
from .tool_choice import NamedTool

_EFFORT_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which chat templates turn reasoning on and off."""


def check_chat(state: ServerState, body: ChatFields) -> None:
    """Raises InvalidRequestError for fields that contradict each other or are not allowed."""
    if body.chat_template is not None and not state.settings.trust_request_chat_template:
        raise InvalidRequestError(
            "a chat_template in a request is not accepted by this server", "chat_template"
        )
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        if body.messages[-1].role != "assistant" or not body.messages[-1].content:
            raise InvalidRequestError(
                "continue_final_message needs text of the assistant as the last message",
                "continue_final_message",
            )
    for index, message in enumerate(body.messages):
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise InvalidRequestError(
                f"messages[{index}]: content is missing", f"messages[{index}].content"
            )
    _check_tools(state, body)


def _check_tools(state: ServerState, body: ChatFields) -> None:
    choice = body.tool_choice
    names = [tool.function.name for tool in body.tools or ()]
    if choice == "required" and not names:
        raise InvalidRequestError("tool_choice is required, but there are no tools", "tool_choice")
    if isinstance(choice, NamedTool) and choice.name not in names:
        raise InvalidRequestError(f"no tool has the name {choice.name[:128]!r}", "tool_choice")
    if offered_tools(body) and state.message_format.tool_format is None:
        raise InvalidRequestError(
            "how this model writes tool calls is not known; see --tool-call-parser", "tools"
        )


def offered_tools(body: ChatFields) -> list[dict[str, Any]]:
    """The tools that the model is told of, as chat templates read them."""
    if body.tool_choice == "none":
        return []
    tools = []
    for tool in body.tools or ():
        function: dict[str, Any] = {"name": tool.function.name}
        if tool.function.description is not None:
            function["description"] = tool.function.description
        function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
        tools.append({"type": "function", "function": function})
    return tools


def forces_call(body: ChatFields) -> bool:
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)


def unenforced(body: ChatFields) -> list[str]:
    """Fields that ask for arguments by a schema, where nothing makes the model keep to it."""
    return [
        f"tools[{index}].function.strict"
        for index, tool in enumerate(body.tools or ())
        if tool.function.strict and not forces_call(body)
    ]


async def encode_chat(
    state: ServerState, body: ChatFields, add_special_tokens: bool | None, max_tokens: int | None
) -> list[int]:
    """The token ids of a chat. Raises InvalidRequestError."""
    if body.add_generation_prompt is None:
        add_generation_prompt = not body.continue_final_message
    else:
        add_generation_prompt = body.add_generation_prompt
    tools = offered_tools(body)
    if state.message_format.is_harmony:
        for tool in tools:  # gpt-oss's template fails without
            tool["function"].setdefault("description", "")
    return await state.tokenizer.encode_chat(
        [_template_message(message, state) for message in body.messages],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(add_special_tokens),
        documents=body.documents,
        tools=tools or None,
        template=body.chat_template,
        template_kwargs=await _template_settings(state, body),
        max_tokens=max_tokens,
    )


async def _template_settings(state: ServerState, body: ChatFields) -> dict[str, Any]:
    """chat_template_kwargs, and `reasoning_effort` by the name that the template knows."""
    settings = dict(body.chat_template_kwargs or {})
    effort = body.reasoning_effort
    if effort is None:
        return settings
    known = await state.tokenizer.template_variables(body.chat_template)
    wanted: dict[str, Any] = {name: effort != "none" for name in _EFFORT_SWITCHES}
    wanted["reasoning_effort"] = effort
    understood = {name: value for name, value in wanted.items() if name in known}
    reasons = state.message_format.reasoning is not None
    if not understood and (effort != "none" or reasons):
        raise InvalidRequestError(
            "the model's chat template has no setting for reasoning_effort", "reasoning_effort"
        )
    return {**understood, **settings}


def _template_message(message: Message, state: ServerState) -> dict[str, Any]:
    """The message as chat templates read it. Raises InvalidRequestError."""
    fields: dict[str, Any] = message.model_dump(exclude_none=True)
    for name in message.model_extra or ():
        fields.pop(name, None)
    fields.setdefault("content", "")
    reasoning = fields.pop("reasoning", None)
    if reasoning is not None:
        fields.setdefault("reasoning_content", reasoning)
    if state.message_format.is_harmony and "reasoning_content" in fields:
        # gpt-oss's template has its own name for it, and refuses it beside content and calls.
        thinking = fields.pop("reasoning_content")
        if not (fields["content"] and fields.get("tool_calls")):
            fields["thinking"] = thinking
    for call in fields.get("tool_calls", ()):
        parse_arguments(call["function"]["arguments"])
    return fields
