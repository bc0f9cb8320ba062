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
from ..requests.protocol import check_types, path_of

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
