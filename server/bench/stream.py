"""Reads one streamed answer: when its chunks arrived, and which usage it reported.

An *output chunk* is an event whose choice carries output. The opening chunk of a chat, which only
names a role, and a last chunk that only says why the answer ended carry none. docs/benchmarking.md
has all definitions.
"""

from __future__ import annotations

from typing import Any

import msgspec


class RequestError(Exception):
    """A request failed. Errors are counted by their `kind`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request of a run, with times in seconds.

    `start` counts from the start of the run. `ttft` and `e2e` are the times from sending to the
    first output chunk and to the last event with a choice. `itls` are the gaps between successive
    output chunks of the same choice. `draft_tokens`, and how many of them were accepted, are what
    the answer itself says of speculative decoding. `error` is the kind of an error; the other
    fields then have the values that they had when it occurred.
    """

    start: float
    requested_output_tokens: int
    ttft: float | None = None
    e2e: float | None = None
    itls: list[float] = msgspec.field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    draft_tokens: int | None = None
    accepted_draft_tokens: int | None = None
    num_choices: int = 1
    error: str | None = None
    error_message: str | None = None

    @property
    def tpot(self) -> float | None:
        """(E2E − TTFT) / (n − 1) in seconds, where n is the output tokens of one choice."""
        tokens = self.output_tokens / self.num_choices
        if self.e2e is None or self.ttft is None or tokens <= 1:
            return None
        return (self.e2e - self.ttft) / (tokens - 1)


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Timings(msgspec.Struct):
    """What llama.cpp's server says with the last event."""

    draft_n: int | None = None
    draft_n_accepted: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class StreamReader:
    """Reads the events of one answer into a record; `begin` is the time of its request.

    `feed` is the sink of the HTTP client, and `finish` must be called after the last piece. Both
    raise RequestError.
    """

    def __init__(self, record: RequestRecord, begin: float) -> None:
        self._record = record
        self._begin = begin
        self._rest = b""
        self._last: dict[int, float] = {}
        self._usage: _Usage | None = None
        self._timings: _Timings | None = None
        self._done = False

    def feed(self, data: bytes, now: float) -> None:
        """Read a piece that arrived at `now`. It may begin and end anywhere within an event."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    self._done = True
                else:
                    self._read(payload, now)

    def finish(self) -> None:
        """Complete the record. Raises RequestError if the stream did not end properly."""
        record = self._record
        if not self._done:
            raise RequestError("stream_cut", "the stream ended without [DONE]")
        if record.e2e is None:
            raise RequestError("empty_stream", "the stream had no choices")
        if self._usage is None:
            raise RequestError("no_usage", "the server ignored stream_options.include_usage")
        if record.ttft is None:
            record.ttft = record.e2e  # one chunk carried the only token and the end
        record.prompt_tokens = self._usage.prompt_tokens
        record.output_tokens = self._usage.completion_tokens
        if self._usage.prompt_tokens_details is not None:
            record.cached_tokens = self._usage.prompt_tokens_details.cached_tokens
        self._take_drafts(record, self._usage.completion_tokens_details)

    def _take_drafts(self, record: RequestRecord, details: _CompletionDetails | None) -> None:
        """Take over what the answer says of drafts, which few servers do."""
        if self._timings is not None and self._timings.draft_n is not None:
            record.draft_tokens = self._timings.draft_n
            record.accepted_draft_tokens = self._timings.draft_n_accepted or 0
        elif details is not None and details.accepted_prediction_tokens is not None:
            accepted = details.accepted_prediction_tokens
            record.draft_tokens = accepted + (details.rejected_prediction_tokens or 0)
            record.accepted_draft_tokens = accepted

    def _read(self, payload: bytes, now: float) -> None:
        try:
            event = _decode(payload)
        except msgspec.DecodeError as error:
            raise RequestError("bad_event", f"{error}: {payload[:200]!r}") from error
        if event.error is not None:
            raise error_of(event.error, "stream_error")
        if event.usage is not None:
            self._usage = event.usage
        if event.timings is not None:
            self._timings = event.timings
        record = self._record
        for choice in event.choices:
            if choice.finish_reason in ("abort", "error"):
                raise RequestError(
                    f"finish_{choice.finish_reason}", "the server gave up the request"
                )
            record.e2e = now - self._begin
            if _has_output(choice):
                if record.ttft is None:
                    record.ttft = record.e2e
                last = self._last.get(choice.index)
                if last is not None:
                    record.itls.append(now - last)
                self._last[choice.index] = now


def error_of(error: Any, fallback: str) -> RequestError:
    """Make a RequestError of the `error` in OpenAI's error body; its code or type is the kind."""
    if not isinstance(error, dict):
        return RequestError(fallback, str(error))
    kind = error.get("code") or error.get("type") or fallback
    return RequestError(str(kind), str(error.get("message", "")))


def _has_output(choice: _Choice) -> bool:
    """Tell whether the chunk stands for output.

    A chunk without text, role and finish reason does: it is a token whose text is held back.
    """
    delta = choice.delta
    if delta is None:
        return bool(choice.text) or choice.finish_reason is None
    if delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls:
        return True
    return delta.role is None and choice.finish_reason is None
