"""HEAD of endless answers, what the metrics count, bodies at once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from quire.engine.errors import QueueFullError
from quire.server.http.middleware import BODIES_AT_ONCE, BodyLimitMiddleware, HeadMiddleware
from quire.server.metrics.metrics import Metrics
from quire.server.tenants.caller import Caller
from quire.server.tenants.key_metrics import KeyMetrics
from quire.server.tenants.rates import Rates
from quire.server.tenants.tenant import Tenant

from ..conftest import MakeClient, app_client
from ..fakes import FakeEngineClient
from ..openai_http import HI, PROMPT


async def test_head_of_a_stream_ends_it_after_its_headers() -> None:
    sent = 0

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        assert scope["method"] == "GET"
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        gone = asyncio.create_task(_disconnected(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            sent += 1
            await asyncio.sleep(0)

    async with app_client(HeadMiddleware(endless)) as client:
        async with asyncio.timeout(5):
            response = await client.head("/")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == "text/event-stream"
    assert sent < 100


async def _disconnected(receive: Receive) -> None:
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()


@pytest.mark.parametrize("leaves", ["in its body", "as it waits", "as it waits, streamed"])
@pytest.mark.parametrize(
    "path, fields",
    [
        ("/v1/completions", PROMPT),
        ("/v1/chat/completions", HI),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {**HI, "max_tokens": 5}),
    ],
)
async def test_a_client_that_leaves_before_its_answer_begins_counts_as_499(
    make_client: MakeClient,
    engine: FakeEngineClient,
    path: str,
    fields: dict[str, Any],
    leaves: str,
) -> None:
    app = make_client().app  # type: ignore[attr-defined]
    engine.hold = asyncio.Event()
    body = json.dumps({**fields, "model": "tiny", "stream": leaves.endswith("streamed")}).encode()
    cut = leaves == "in its body"
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": cut}]

    async def receive() -> Message:
        if parts:
            return parts.pop()
        while not (cut or engine.requests):
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    async with asyncio.timeout(5):
        await app(scope, receive, send)
    page = (
        await httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://quire"
        ).get("/metrics")
    ).text
    [line] = [line for line in page.splitlines() if line.startswith("http_requests_total{")]
    assert f'handler="{path}"' in line and 'status="499"' in line, line


async def test_a_caller_that_sends_slowly_does_not_shut_out_the_others() -> None:
    refused: list[object] = []
    held: dict[str, int] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        more, own = True, 0
        key = scope["state"]["caller"].tenant.name
        try:
            while more:
                part = await receive()
                own += len(part["body"])
                held[key] = held.get(key, 0) + len(part["body"])
                more = part["more_body"]
        except QueueFullError:
            refused.append(key)
        held[key] -= own

    limited = BodyLimitMiddleware(app, max_bytes=2**20)
    go_on = asyncio.Event()

    async def send_body(name: str, size: int) -> None:
        tenant = Tenant(owner=name.encode(), name=name, digests=(name.encode(),))
        left = size

        async def receive() -> Message:
            nonlocal left
            part, left = min(2**16, left), left - 2**16
            if left <= 0:
                await go_on.wait()
            return {"type": "http.request", "body": b"x" * part, "more_body": left > 0}

        async def send(message: Message) -> None:
            pass

        caller = Caller(tenant, Rates(), KeyMetrics(Metrics("m")))
        scope = {"type": "http", "headers": [], "state": {"caller": caller}}
        await limited(scope, receive, send)

    slow = [asyncio.create_task(send_body("slow", 2**20)) for _ in range(20)]
    await asyncio.sleep(0.05)
    assert set(refused) == {"slow"} and held["slow"] > (BODIES_AT_ONCE - 1) * 2**20
    refused.clear()
    other = [asyncio.create_task(send_body("other", 2**20)) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert not refused and held["other"] > 2 * 2**20
    more = [asyncio.create_task(send_body("other", 2**20)) for _ in range(9)]
    await asyncio.sleep(0.05)
    assert set(refused) == {"other"} and sum(held.values()) <= 2 * BODIES_AT_ONCE * 2**20
    go_on.set()
    await asyncio.gather(*slow, *other, *more)
    assert not limited._held  # nothing is counted twice


async def test_the_bodies_that_are_being_read_are_bounded_together() -> None:
    held, go_on = 0, asyncio.Event()
    refused: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal held
        more, own = True, 0
        try:
            while more:
                part = await receive()
                own += len(part["body"])
                held += len(part["body"])
                more = part["more_body"]
        except QueueFullError as error:
            refused.append(error.message)
            held -= own

    limited = BodyLimitMiddleware(app, max_bytes=2**20)

    async def send_body(size: int, *, ends: bool) -> None:
        parts = [b"x" * min(size - at, 2**16) for at in range(0, size, 2**16)]

        async def receive() -> Message:
            if len(parts) == 1:
                await (asyncio.sleep(0) if ends else go_on.wait())
            body = parts.pop()
            return {"type": "http.request", "body": body, "more_body": bool(parts)}

        async def send(message: Message) -> None:
            pass

        await limited({"type": "http", "headers": []}, receive, send)

    slow = [asyncio.create_task(send_body(15 * 2**16, ends=False)) for _ in range(60)]
    await asyncio.sleep(0.05)
    assert held <= BODIES_AT_ONCE * 2**20 and 50 < len(refused) < 60
    await send_body(2**16, ends=True)  # small ones are served all the same
    go_on.set()
    await asyncio.gather(*slow)
    served = len(refused)
    await send_body(2**20, ends=True)
    assert len(refused) == served
    assert not limited._held
