"""What a chat template reads of a conversation, as plain facts that `template_probe` finds out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Form = Literal["text", "parts", "either", "none", "refused"]
"""How the content of a role must be written: as one string, as a list of parts, or as either;
"none" if the template drops both without an error, "refused" if it raises an error for both."""
Placing = Literal["together", "apart", "none"]
"""Whether two things may stand in one message, must stand in two, or cannot both be written."""
EmptyContent = Literal["empty", "null", "missing"]
"""How a message with calls and no text must be written: content "", null, or no content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateTraits:
    """What one chat template reads, found out by rendering conversations with known words."""

    probed: bool
    """False if the template refused even the simplest conversation. All messages are then passed
    to it as OpenAI writes them, and the other traits say so."""
    user: Form
    assistant: Form
    system: Form
    tool: Form
    developer: bool
    """The template names the role "developer" and writes its text."""
    system_beside_tools: bool
    """A system message is also written if tools are offered."""
    several_systems: bool
    """Two system messages at the beginning are both written."""
    lone_system: bool
    """A system message without any user message is written."""
    lasting_system: bool
    """A system message is also written if a conversation ends with an answer or a tool's result."""
    late_system: bool
    """A system message after the first turn is written."""
    repeated_user: bool
    """Two user messages in a row are both written."""
    repeated_assistant: bool
    """Two assistant messages in a row are both written."""
    history: bool
    """Turns before the last one are written."""
    user_name: bool
    """The `name` of a user message is read."""
    calls: bool
    """Names and arguments of the assistant's calls are written."""
    calls_without_tools: bool
    """They are also written if no tools are offered."""
    arguments: Literal["object", "text"]
    """Whether arguments of calls are read as JSON objects or as JSON text."""
    flat_calls: bool
    """The name and the arguments of a call are read from the call instead of its `function`."""
    short_call_ids: bool
    """Ids of calls must be nine letters or digits."""
    empty_content: EmptyContent
    parallel_calls: Placing
    """Two calls of one turn."""
    content_beside_calls: Placing
    """Text and calls of one turn."""
    tool_name: bool
    """The `name` of a tool's message is read."""
    reasoning: Literal["reasoning_content", "thinking", "reasoning"] | None
    """The name under which earlier reasoning is read."""
    reasoning_beside_content: bool
    """Reasoning is accepted in a message that has both text and calls."""
    tools: Literal["nested", "flat", "none"]
    """Whether tools are read as OpenAI writes them or with the function's fields at the top."""
    needs_description: bool
    """The template fails on a tool without a description."""
    documents: tuple[str, ...]
    """The fields of documents that are written; `*` stands for any field, none for no documents."""
    settings: tuple[str, ...]
    """Variables that `chat_template_kwargs` may set."""
    thinking: tuple[str, ...]
    """Those of `settings` that change how much the model reasons."""
    generation_prompt: str
    """The text that begins the assistant's turn."""
    turn_end: str
    """The control token after the assistant's text, or "" if there is none."""

    def as_dict(self) -> dict[str, Any]:
        """Return the traits as a JSON object."""
        return asdict(self)

    def shortcomings(self) -> list[str]:
        """Return one sentence for each part of a conversation that the template does not write, and
        what becomes of requests that have it."""
        found = {
            "it refuses the simplest chat: messages are passed to it as they are": not self.probed,
            "users' text is not written: chats are refused": self.user == "none",
            "turns before the last are not written: longer chats are refused": not self.history,
            "the assistant's text is not written: chats with earlier answers are refused": (
                self.assistant in ("none", "refused")
            ),
            "system messages are not written: their text goes before the user's": (
                self.system in ("none", "refused")
            ),
            "tools are not written: chats with tools are refused": self.tools == "none",
            "calls of earlier turns are not written: chats with them are refused": not self.calls,
            "tools' results are not written: chats with them are refused": (
                self.tool in ("none", "refused")
            ),
            "a turn with two calls is not written: chats with one are refused": (
                self.calls and self.parallel_calls == "none"
            ),
            "text beside calls is not written: it is named in x-quire-ignored-params": (
                self.calls and self.content_beside_calls == "none"
            ),
        }
        return [sentence for sentence, holds in found.items() if holds]
