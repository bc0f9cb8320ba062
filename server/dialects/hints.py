"""Hints: fields that a client may send, but that change nothing here.

They are named in the answer's header `x-quire-ignored-params`, like unknown fields, and refused
only by a server with `--strict`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

from pydantic import BaseModel

from ...engine.errors import InvalidRequestError
from ..api.translation import Path
from ..requests.chat_prompt import EFFORT_VARIABLES
from ..requests.protocol import ChatBody, check_types, path_of
from ..requests.state import ServerState

Checked = TypeVar("Checked", bound=BaseModel)


class Ignored:
    """Collects the paths of the fields of one body that have no effect."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self.names: list[str] = []

    def add(self, where: Path, value: Any = True, harmless: Collection[Any] = ()) -> None:
        """Name a field, unless its value is None or one of `harmless`, which ask for nothing.

        Raises InvalidRequestError if the server is strict.
        """
        if value is None or value in harmless:
            return
        param = path_of(where)
        if self.strict:
            raise InvalidRequestError(f"{param} has no effect on this server", param)
        self.names.append(param)

    def mention(self, where: Path) -> None:
        """Name a field that even a strict server accepts."""
        self.names.append(path_of(where))

    def check(self, model: type[Checked], fields: dict[str, Any], where: Path = ()) -> Checked:
        """Validate `fields`, which are at `where`, and add their unknown fields. Raises
        InvalidRequestError."""
        checked, unknown = check_types(model, fields, strict=self.strict, within=where)
        self.names += unknown
        return checked


async def fit_effort(state: ServerState, chat: ChatBody, ignored: Ignored, where: Path) -> None:
    """Take the reasoning effort out of `chat` if the model's template has no setting for it, and
    name the field at `where`, which asked for it. Raises InvalidRequestError."""
    if chat.reasoning_effort is None:
        return
    known = await state.tokenizer.template_variables(chat.chat_template)
    if known.isdisjoint(EFFORT_VARIABLES):
        reasons = state.message_format.reasoning is not None
        if chat.reasoning_effort != "none" or reasons:
            ignored.add(where)
        chat.reasoning_effort = None
