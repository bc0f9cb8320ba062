"""What the answers of completions and chat completions share: ids, usage, chunks, streams."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

from fastapi import Request

from ...engine.errors import QuireError
from ..errors import error_body
from ..http.limits import Ticket
from ..http.resumption import ResumableStream, asks_to_resume
from ..http.route_docs import OBJECTS, STRING, json_object
from ..http.sse import EventStream, Pace, SseResponse, event
from ..json_text import encode_line
from ..metrics.metrics import Metrics
from ..requests.generation import Generation
from ..requests.protocol import GenerationBody
from ..requests.state import state_of
from .whole_answers import encode_large

GENERATION = json_object("id", "object", "created", "model", "choices", "usage", choices=OBJECTS)
"""The schema of a completion and of a chat completion."""
DELETED = json_object("id", "object", "deleted", id=STRING)
"""The schema of the answer to a DELETE."""
_MAX_IGNORED = 20  # names in the header


@contextmanager
def refusals_counted(metrics: Metrics) -> Iterator[None]:
    """Count refusals by their code; wrap everything that comes before the engine."""
    try:
        yield
    except QuireError as error:
        metrics.request_rejected(error.code)
        raise


def ignored_header(ignored: list[str], changes: Sequence[str] = ()) -> dict[str, str]:
    """Return the headers that name unknown fields, which were accepted but have no effect, and
    `changes` of the messages for the chat template."""
    headers = {}
    if ignored:
        headers["x-quire-ignored-params"] = ", ".join(ignored[:_MAX_IGNORED])
    if changes:
        headers["x-quire-prompt-changes"] = ", ".join(changes)
    return headers


class _Options(TypedDict):
    on_failure: Callable[[Exception], list[bytes]]
    on_close: Callable[[], None]
    request_id: str
    deadline: float | None


def stream_of(
    request: Request,
    events: AsyncGenerator[bytes, None],
    on_failure: Callable[[], list[bytes]],
    ticket: Ticket,
    deadline: float | None,
    headers: dict[str, str],
) -> SseResponse:
    """Return the answer that streams `events`, resumable if the request's header asks for it.

    `on_failure` makes the events that precede the error event. Raises QuireError, and then closes
    the ticket.
    """
    state = state_of(request)
    request_id, pace = request.state.request_id, Pace.of(state.settings)
    options: _Options = {
        "on_failure": lambda error: [*on_failure(), event(error_body(error, request_id))],
        "on_close": ticket.close,
        "request_id": request_id,
        "deadline": deadline,
    }
    try:
        if not asks_to_resume(request, state.settings.stream_resume_ttl):
            return EventStream(events, headers=headers, pace=pace, **options)
        stream = state.streams.open(state.keys.owner(request), events, **options)
    except BaseException:
        ticket.close()
        raise
    return ResumableStream(
        state.streams, stream, 0, request_id=request_id, headers=headers, pace=pace, opened=True
    )


class Envelope:
    """The fields around `choices`, encoded only once for all chunks of a stream."""

    def __init__(
        self,
        answer_id: str,
        kind: str,
        body: GenerationBody,
        generation: Generation,
        *,
        model: str,
        fingerprint: str,
    ) -> None:
        self._generation = generation
        self._fields = {
            "id": answer_id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        options = body.stream_options
        self.include_usage = bool(options and options.include_usage)
        self._continuous = self.include_usage and bool(options and options.continuous_usage_stats)
        # {"id": …, "choices":[ CHOICE ],"usage":…}
        self._head = b"data: " + encode_line(self._fields)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if self.include_usage else b"]}\n\n"
        self._finished: set[int] = set()

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the whole answer."""
        return {**self._fields, "choices": choices, "usage": self._generation.usage()}

    def chunk(
        self,
        choice: dict[str, Any],
        *,
        opening: bool = False,
        prompt_token_ids: Sequence[int] | None = None,
        large: bool = False,
    ) -> bytes:
        """Return the event of a chunk with one choice, and with the ids of the prompt if given.

        An `opening` chunk brings no token, so its usage counts none, although some have come. One
        that is `large` is encoded in pieces, for use in a thread.
        """
        if choice["finish_reason"] is not None:
            self._finished.add(choice["index"])
        tail = self._tail
        if self._continuous:
            usage = self._generation.usage()
            if opening:
                usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
            tail = b'],"usage":' + encode_line(usage) + b"}\n\n"
        if prompt_token_ids is not None:
            tail = b'],"prompt_token_ids":' + encode_line(list(prompt_token_ids)) + tail[1:]
        if large:
            return bytes(encode_large(choice, self._head, tail))
        return self._head + encode_line(choice) + tail

    def usage_chunk(self) -> bytes:
        """Return the event of the last chunk, which has the usage and no choices."""
        return event({**self._fields, "choices": [], "usage": self._generation.usage()})

    def unfinished(self) -> list[int]:
        """Return the indices of the choices that have no terminal chunk yet."""
        indices = (choice.index for group in self._generation.choices for choice in group)
        return [index for index in indices if index not in self._finished]
