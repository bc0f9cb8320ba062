"""The protocol of a format of tool calls: one value for each, in the file of its family."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .answer_parser import AnswerParser
from .call_shape import CallShape


def cannot_be_forced(template: str) -> CallShape | None:
    """Return no shape: calls in the format cannot be forced."""
    return None


class ToolFormat(NamedTuple):
    """A format in which models write tool calls."""

    name: str
    """The value of --tool-call-parser; vLLM's name for the format, if it has one."""
    parser: type[AnswerParser]
    shape: Callable[[str], CallShape | None] = cannot_be_forced
    """Returns how a model with this chat template writes calls, so that they can be forced; None if
    they cannot be."""
    signs: tuple[tuple[str, ...], ...] = ()
    """A chat template has this format if all texts of one of these tuples are in it."""
    aliases: tuple[str, ...] = ()
    """Other values of --tool-call-parser."""

    def is_in(self, template: str) -> bool:
        """Return whether a chat template shows that the model writes this format."""
        return any(all(text in template for text in texts) for texts in self.signs)
