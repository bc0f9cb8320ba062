"""Streams that outlive their connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import openai
import pytest

from quire.engine.errors import InvalidRequestError, QueueFullError, StreamGoneError
from quire.engine.outputs import RowError
from quire.server.http import event_log, resumption
from quire.server.http.event_log import EventLog
from quire.server.http.resumption import StreamRegistry

from ..conftest import MODEL, MakeClient
from ..fakes import FakeEngineClient, Script, ids, say
from ..openai_http import CHAT

HI: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
RESUMABLE = {"x-quire-resumable": "1"}


class Event:
    def __init__(self, text: str) -> None:
        id_line, data = text.split("\n", 1)
        self.id = id_line.removeprefix("id: ")
        self.stream_id, _, number = self.id.rpartition("-")
        self.number = int(number)
        self.data = data.removeprefix("data: ")


def parse(text: str) -> list[Event]:
    return [Event(part) for part in text.split("\n\n") if part and not part.startswith(":")]


def registry_of(client: httpx.AsyncClient) -> StreamRegistry:
    registry: StreamRegistry = client.app.state.quire.streams  # type: ignore[attr-defined]
    return registry


class RawConnection:
    """A raw ASGI connection that can disconnect at any time, unlike one of httpx's transport."""

    def __init__(self, app: Any, path: str, body: Any = None, **headers: str) -> None:
        self.parts: list[bytes] = []
        self.status = 0
        self.headers: dict[str, str] = {}
        self._gone = asyncio.Event()
        self._body: bytes | None = b"" if body is None else json.dumps(body).encode()
        sent = {"content-type": "application/json", **headers}
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1",
            "method": "GET" if body is None else "POST", "path": path, "raw_path": path.encode(),
            "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [(k.lower().encode(), v.encode()) for k, v in sent.items()],
            "client": None, "server": None,
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.parts.append(message["body"])

    @property
    def text(self) -> str:
        return b"".join(self.parts).decode()

    async def wait_for_events(self, count: int) -> list[Event]:
        async with asyncio.timeout(5):
            while len(parse(self.text)) < count:
                await asyncio.sleep(0.001)
        return parse(self.text)

    async def disconnect(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self.task, 5)


@pytest.fixture
def slow(engine: FakeEngineClient) -> FakeEngineClient:
    engine.scripts = lambda request, choice: Script(ids("abcdefghij"), delay=0.02)
    return engine


async def test_a_stream_resumes_after_the_last_event_received(
    make_client: MakeClient, slow: FakeEngineClient
) -> None:
    client = make_client()
    first = RawConnection(client.app, CHAT, {**HI, "n": 3}, **RESUMABLE)  # type: ignore[attr-defined]
    await first.wait_for_events(8)
    await first.disconnect()
    seen = parse(first.text)
    stream_id = first.headers["x-quire-stream-id"]
    assert {event.stream_id for event in seen} == {stream_id}
    assert slow.aborted == []
    # If the last event was lost on the way, the client names the event before it.
    kept = seen[:-1]
    rest = await client.get(f"/v1/streams/{stream_id}", headers={"last-event-id": kept[-1].id})
    assert rest.status_code == 200
    assert rest.headers["content-type"].startswith("text/event-stream")
    events = [*kept, *parse(rest.text)]
    assert [event.number for event in events] == list(range(len(events)))
    assert events[-1].data == "[DONE]"
    chunks = [json.loads(event.data) for event in events[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] == 33
    for index in range(3):
        choices = [chunk["choices"][0] for chunk in chunks[:-1]]
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "abcdefghij"
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["stop"]
    # A client may read everything again. One that has received all events gets nothing.
    whole = await client.get(f"/v1/streams/{stream_id}")
    assert [event.id for event in parse(whole.text)] == [event.id for event in events]
    end = await client.get(f"/v1/streams/{stream_id}", headers={"last-event-id": events[-1].id})
    assert (end.status_code, end.content) == (204, b"")
    await registry_of(client).close()


async def test_a_stream_without_a_reader_runs_until_its_ttl_ends(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say("x" * 400, delay=0.01)
    client = make_client(stream_resume_ttl=0.15)
    body = {"prompt": "a", "stream": True, "max_tokens": 400}
    first = RawConnection(client.app, "/v1/completions", body, **RESUMABLE)  # type: ignore[attr-defined]
    await first.wait_for_events(2)
    await first.disconnect()
    stream_id = first.headers["x-quire-stream-id"]
    await asyncio.sleep(0.08)
    assert engine.running
    async with asyncio.timeout(2):
        while engine.running:
            await asyncio.sleep(0.01)
    assert {request_id for request_id, _ in engine.aborted} == {engine.requests[0].request_id}
    gone = await client.get(f"/v1/streams/{stream_id}")
    assert gone.status_code == 410
    assert gone.json()["error"]["code"] == "stream_gone"
    unknown = await client.get("/v1/streams/nonsense")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "stream_not_found")
    registry = registry_of(client)
    assert (len(registry), registry.total_bytes) == (0, 0)
    in_flight = client.app.state.quire.in_flight  # type: ignore[attr-defined]
    assert in_flight.num_queued == in_flight.num_running == 0


async def test_without_the_header_a_disconnect_aborts_and_events_have_no_id(
    client: httpx.AsyncClient, slow: FakeEngineClient
) -> None:
    first = RawConnection(client.app, CHAT, HI)  # type: ignore[attr-defined]
    async with asyncio.timeout(5):
        while not first.text:
            await asyncio.sleep(0.001)
    await first.disconnect()
    assert not slow.running
    assert {request_id for request_id, _ in slow.aborted} == {slow.requests[0].request_id}
    assert "id: " not in first.text
    assert "x-quire-stream-id" not in first.headers
    assert len(registry_of(client)) == 0


async def test_a_disconnect_before_the_id_is_sent_aborts(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.hold = asyncio.Event()
    first = RawConnection(client.app, CHAT, HI, **RESUMABLE)  # type: ignore[attr-defined]
    async with asyncio.timeout(5):
        while not engine.running:
            await asyncio.sleep(0.001)
    await first.disconnect()
    assert len(registry_of(client)) == 0
    await asyncio.sleep(0.01)
    assert not engine.running


async def test_a_second_connection_takes_over(
    client: httpx.AsyncClient, slow: FakeEngineClient
) -> None:
    first = RawConnection(client.app, CHAT, HI, **RESUMABLE)  # type: ignore[attr-defined]
    seen = await first.wait_for_events(3)
    url = f"/v1/streams/{first.headers['x-quire-stream-id']}"
    second = await client.get(url, headers={"last-event-id": seen[0].id})
    await asyncio.wait_for(first.task, 5)
    assert '"code":"stream_gone"' in first.text
    assert first.text.endswith("data: [DONE]\n\n")
    assert [event.number for event in parse(second.text)][0] == 1
    assert parse(second.text)[-1].data == "[DONE]"
    await registry_of(client).close()


async def test_deleting_a_stream_aborts_it(
    client: httpx.AsyncClient, slow: FakeEngineClient
) -> None:
    first = RawConnection(client.app, CHAT, HI, **RESUMABLE)  # type: ignore[attr-defined]
    await first.wait_for_events(2)
    url = f"/v1/streams/{first.headers['x-quire-stream-id']}"
    assert (await client.delete(url)).json()["deleted"] is True
    await asyncio.wait_for(first.task, 5)
    assert first.text.endswith("data: [DONE]\n\n")
    assert not slow.running
    assert (await client.delete(url)).status_code == 410


async def test_streams_belong_to_their_key(make_client: MakeClient, slow: FakeEngineClient) -> None:
    client = make_client(api_key=("one", "two"))
    mine, other = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    answer = await client.post(CHAT, json=HI, headers={**RESUMABLE, **mine})
    url = f"/v1/streams/{answer.headers['x-quire-stream-id']}"
    assert (await client.get(url, headers=mine)).status_code == 200
    for method in ("GET", "DELETE"):
        assert (await client.request(method, url)).status_code == 401
        assert (await client.request(method, url, headers=other)).status_code == 404
    assert (await client.delete(url, headers=mine)).status_code == 200
    assert (await client.get(url, headers=mine)).status_code == 410
    assert (await client.get(url, headers=other)).status_code == 404


@pytest.mark.parametrize("last", ["", "x", "{id}-999", "{id}--1", "{id}-²", "other-0"])
async def test_a_wrong_event_id_is_400(client: httpx.AsyncClient, last: str) -> None:
    answer = await client.post(CHAT, json=HI, headers=RESUMABLE)
    stream_id = answer.headers["x-quire-stream-id"]
    headers = {"last-event-id": last.format(id=stream_id).encode()}
    refused = await client.get(f"/v1/streams/{stream_id}", headers=headers)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "Last-Event-ID"
    await registry_of(client).close()


async def test_the_header_is_refused_if_it_is_unknown_or_resumption_is_off(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    off = make_client(stream_resume_ttl=0)
    for client, value in ((off, "1"), (make_client(), "yes")):
        answer = await client.post(CHAT, json=HI, headers={"x-quire-resumable": value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "x-quire-resumable"
        in_flight = client.app.state.quire.in_flight  # type: ignore[attr-defined]
        assert in_flight.num_queued == in_flight.num_running == 0
    assert engine.requests == []


async def test_failures_have_a_status_before_the_first_event_and_an_event_after_it(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    error = RowError("non_finite_logits", "NaN")
    engine.scripts = lambda request, choice: Script([], finish="error", error=error)
    answer = await client.post(CHAT, json=HI, headers=RESUMABLE)
    assert answer.status_code == 500
    engine.scripts = lambda request, choice: Script(ids("ab"), finish="error", error=error)
    answer = await client.post(CHAT, json=HI, headers=RESUMABLE)
    *_, failure, done = parse(answer.text)
    assert json.loads(failure.data)["error"]["code"] == "non_finite_logits"
    assert done.data == "[DONE]"
    await registry_of(client).close()


async def test_the_sdk_reads_a_resumable_stream(client: httpx.AsyncClient) -> None:
    sdk = openai.AsyncOpenAI(base_url="http://quire/v1", api_key="x", http_client=client)
    messages: Any = HI["messages"]
    for headers in ({}, RESUMABLE):
        stream = await sdk.chat.completions.create(
            model=MODEL, messages=messages, stream=True, extra_headers=headers
        )
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(parts) == "Hello, world"
    await registry_of(client).close()


# --- bounds


async def numbers(count: int, size: int = 1) -> AsyncGenerator[bytes, None]:
    for number in range(count):
        yield b"data: %b%d\n\n" % (b"0" * size, number)
        await asyncio.sleep(0)


def open_log(registry: StreamRegistry, count: int, size: int = 1, owner: bytes = b"") -> EventLog:
    return registry.open(
        owner,
        numbers(count, size),
        on_failure=lambda error: [],
        on_close=lambda: None,
        request_id="r",
        deadline=None,
    )


async def settle(log: EventLog) -> None:
    await asyncio.wait({log.task}, timeout=5)
    assert log.task.done()


async def test_old_events_that_were_read_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "MAX_EVENTS", 10)
    registry = StreamRegistry(60)
    log = open_log(registry, 100)
    reader = registry.attach(log, 0)
    text = b""
    while batch := await reader.take():
        text += batch
    assert [event.number for event in parse(text.decode())] == list(range(101))
    assert log.end_number - log.first <= 11
    with pytest.raises(StreamGoneError):
        log.position_after(f"{log.id}-5")
    assert log.position_after(f"{log.id}-98") == 99
    with pytest.raises(InvalidRequestError):
        log.position_after(f"{log.id}-101")
    await registry.close()
    assert registry.total_bytes == 0


async def test_a_slow_reader_blocks_the_producer_and_a_missing_one_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_log, "MAX_BYTES", 2000)
    registry = StreamRegistry(60)
    log = open_log(registry, 100, size=100)
    reader = registry.attach(log, 0)
    for _ in range(300):
        await asyncio.sleep(0)
    assert not log.task.done()
    assert log.size < 2500
    log.detach(reader)
    await settle(log)
    assert log.task.cancelled()
    assert (len(registry), registry.total_bytes) == (0, 0)
    with pytest.raises(StreamGoneError):
        registry.find(log.id, b"")


async def test_the_bytes_of_all_streams_together_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resumption, "MAX_TOTAL_BYTES", 5000)
    registry = StreamRegistry(60)
    ended = open_log(registry, 20)
    registry.attach(ended, 0)
    await settle(ended)
    assert ended.reader is not None
    ended.detach(ended.reader)
    assert len(registry) == 1
    log = open_log(registry, 500, size=50)
    reader = registry.attach(log, 0)
    count = 0
    while batch := await reader.take():
        count += batch.count(b"data: ")
    assert count == 501
    assert registry.total_bytes <= 5000
    with pytest.raises(StreamGoneError):
        registry.find(ended.id, b"")
    await registry.close()


async def test_the_number_of_streams_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumption, "MAX_STREAMS", 2)
    monkeypatch.setattr(resumption, "MAX_REMEMBERED", 1)
    registry = StreamRegistry(60)
    logs = [open_log(registry, 1) for _ in range(2)]
    readers = [registry.attach(log, 0) for log in logs]
    with pytest.raises(QueueFullError):
        open_log(registry, 1)
    for log, reader in zip(logs, readers, strict=True):
        log.detach(reader)
    for _ in range(2):
        log = open_log(registry, 1)
        log.detach(registry.attach(log, 0))
    assert len(registry) == 2
    assert len(registry._remembered) == 1
    await registry.close()


async def test_one_keys_streams_drop_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumption, "MAX_STREAMS", 4)
    registry = StreamRegistry(60)

    def leave(owner: bytes, size: int = 1) -> EventLog:
        log = open_log(registry, 1, size=size, owner=owner)
        log.detach(registry.attach(log, 0))
        return log

    mine = leave(b"mine")
    theirs = [leave(b"theirs") for _ in range(10)]
    assert registry.find(mine.id, b"mine") is mine
    for log in theirs[:-3]:
        with pytest.raises(StreamGoneError):
            registry.find(log.id, b"theirs")
    leave(b"mine")  # a key that has less takes the place of one that has more
    assert registry.find(mine.id, b"mine") is mine and len(registry) == 4
    monkeypatch.setattr(resumption, "MAX_TOTAL_BYTES", 5000)
    for _ in range(10):
        await settle(leave(b"theirs", size=1000))
    assert registry.find(mine.id, b"mine") is mine and registry.total_bytes <= 5000
    await registry.close()
