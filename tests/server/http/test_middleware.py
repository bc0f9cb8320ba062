"""HEAD of endless answers."""

from __future__ import annotations

import asyncio

import httpx
from starlette.types import Message, Receive, Scope, Send

from quire.server.http.middleware import HeadMiddleware


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

    transport = httpx.ASGITransport(app=HeadMiddleware(endless))
    async with httpx.AsyncClient(transport=transport, base_url="http://quire") as client:
        async with asyncio.timeout(5):
            response = await client.head("/")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == "text/event-stream"
    assert sent < 100


async def _disconnected(receive: Receive) -> None:
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()
