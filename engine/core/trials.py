"""Requests under suspicion of having killed engines begin one at a time."""

from __future__ import annotations

from collections.abc import Iterable

from ..outputs import SequenceOutput
from ..request import Request


class Trials:
    """Admits a request that is `on_trial` only when the one before has got a token, or has ended.

    So if one of them does kill this engine, it is clear which.
    """

    def __init__(self) -> None:
        self._present: str | None = None
        """The id of the request that may begin and has got nothing yet."""

    def admits(self, request: Request) -> bool:
        """Return whether a waiting request may begin; if it is on trial, no other may from now
        on."""
        if not request.on_trial:
            return True
        if self._present is None:
            self._present = request.request_id
        return self._present == request.request_id

    def observe(self, outputs: Iterable[SequenceOutput]) -> None:
        """Note a step's outputs."""
        if self._present is not None and any(one.request_id == self._present for one in outputs):
            self._present = None
