from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

from quire.engine.errors import QueueFullError, StepFailedError
from quire.server.errors import error_body
from quire.server.http.sse import DONE, EventStream, Pace, event, run_until_disconnect
from quire.server.json_text import encode_json

from ..conftest import MODEL, MakeClient
from ..fakes import FakeEngineClient, say


class Peer:
    """The client's end of an ASGI connection."""

    def __init__(self, *, read: bool = True) -> None:
        self.sent: list[Any] = []
        self.gone = asyncio.Event()
        self.read = read

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if not self.read and message["type"] == "http.response.body":
            await asyncio.Event().wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Events:
    """A stream of events that records how it ended."""

    def __init__(
        self, *, delay: float = 0.0, error: Exception | None = None, count: int = 3
    ) -> None:
        self.delay, self.error, self.count = delay, error, count
        self.closed_at: float | None = None
        self.closings = 0

    async def run(self) -> AsyncGenerator[bytes, None]:
        try:
            for number in range(self.count):
                await asyncio.sleep(self.delay)
                yield event(number)
            if self.error is not None:
                raise self.error
        finally:
            self.closed_at = time.monotonic()

    def note_close(self) -> None:
        self.closings += 1


async def answer(peer: Peer, events: Events, **options: Any) -> None:
    defaults: dict[str, Any] = {
        "deadline": None,
        "pace": Pace(0.0, 30.0),
        "headers": {},
    }
    stream = EventStream(
        events.run(),
        on_failure=lambda error: [event("terminal"), event(error_body(error))],
        on_close=events.note_close,
        request_id="r",
        **{**defaults, **options},
    )
    await asyncio.wait_for(stream({"type": "http", "path": "/"}, peer.receive, peer.send), 5)
    assert events.closings == 1


async def test_a_stream_ends_with_done_and_is_not_cached() -> None:
    peer = Peer()
    await answer(peer, Events(), headers={"x-a": "b"})
    assert peer.body == b"data: 0\n\ndata: 1\n\ndata: 2\n\n" + DONE
    assert peer.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    headers = dict(peer.sent[0]["headers"])
    assert headers[b"cache-control"] == b"no-cache"
    assert headers[b"x-a"] == b"b"
    assert b"content-length" not in headers


async def test_a_failure_in_the_stream_sends_final_chunks_error_and_done() -> None:
    peer = Peer()
    await answer(peer, Events(error=StepFailedError("why")))
    *_, terminal, error, done, rest = peer.body.split(b"\n\n")
    assert (terminal, done, rest) == (b'data: "terminal"', b"data: [DONE]", b"")
    assert b'"code":"step_failed"' in error


async def test_a_failure_before_the_first_event_has_its_status() -> None:
    peer = Peer()
    await answer(peer, Events(count=0, error=QueueFullError("full")), pace=Pace(0.2, 30.0))
    assert peer.sent[0]["status"] == 429
    assert b"[DONE]" not in peer.body


async def test_a_disconnect_closes_the_events_at_once() -> None:
    peer, events = Peer(), Events(delay=0.01, count=1000)
    asyncio.get_running_loop().call_later(0.05, peer.gone.set)
    started = time.monotonic()
    await answer(peer, events)
    assert events.closed_at is not None
    assert events.closed_at - started < 1


async def test_a_reader_that_stops_reading_is_dropped() -> None:
    peer, events = Peer(read=False), Events(count=1000)
    await answer(peer, events, pace=Pace(0.0, 0.1))
    assert events.closed_at is not None
    assert len(peer.sent) == 2  # the start, and the event that was never read


async def test_silence_is_broken_by_comments_and_the_deadline_by_an_error() -> None:
    peer, events = Peer(), Events(delay=10)
    await answer(peer, events, pace=Pace(0.05, 30.0), deadline=time.monotonic() + 0.3)
    assert peer.sent[0]["status"] == 200
    assert peer.body.startswith(b": keep-alive\n\n: keep-alive\n\n")
    assert b'"code":"request_timeout"' in peer.body
    assert peer.body.endswith(DONE)


@pytest.mark.parametrize("end", ["result", "error", "gone"])
async def test_work_runs_until_the_client_leaves(end: str) -> None:
    peer = Peer()
    cancelled = False

    async def work() -> int:
        nonlocal cancelled
        if end == "error":
            raise StepFailedError("why")
        try:
            await asyncio.sleep(5 if end == "gone" else 0)
        except asyncio.CancelledError:
            cancelled = True
            raise
        return 7

    if end == "gone":
        peer.gone.set()
    if end == "error":
        with pytest.raises(StepFailedError):
            await run_until_disconnect(peer.receive, work(), None)
        return
    result = await run_until_disconnect(peer.receive, work(), None)
    assert result == (7 if end == "result" else None)
    assert cancelled == (end == "gone")


@pytest.mark.parametrize("resumable", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}),
        ("/v1/responses", {"input": "hi"}),
    ],
)
async def test_the_timeout_of_a_stalled_reader_is_a_setting(
    make_client: MakeClient, path: str, fields: dict[str, Any], resumable: bool
) -> None:
    app = make_client(stream_stall_timeout=0.1).app  # type: ignore[attr-defined]
    body = encode_json({"model": MODEL, "stream": True, **fields})
    headers = [(b"content-type", b"application/json"), (b"x-quire-resumable", b"%d" % resumable)]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers,
             "query_string": b"", "client": ("here", 1), "server": ("there", 1)}  # fmt: skip
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])
    peer = Peer(read=False)

    async def receive() -> Any:
        return next(messages, None) or await peer.receive()

    await asyncio.wait_for(app(scope, receive, peer.send), 5)
    assert len(peer.sent) == 2


async def test_no_event_is_split_by_a_reader_that_knows_all_line_ends(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    """Readers built on `str.splitlines` take more characters for line ends than SSE does."""
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
    engine.scripts = say(text)
    for path, fields in (
        ("/v1/completions", {"prompt": text, "echo": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}),
    ):
        response = await make_client().post(path, json={"model": MODEL, "stream": True, **fields})
        assert response.status_code == 200, response.text
        lines = response.text.splitlines()
        assert lines == response.text.removesuffix("\n").split("\n")
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
        assert data and all(json.loads(item) for item in data)
        read = "".join(_strings(list(map(json.loads, data))))
        assert all(character in read for character in text), path


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _strings(child)
