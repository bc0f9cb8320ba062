"""An OpenAI-compatible server with scripted answers.

It uses nothing but sockets, so that it shares no code with what it tests.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The answer to one POST: a chunk per token, each after its delay, or a failure instead."""

    delays: tuple[float, ...] = (0.0, 0.0)
    status: int = 200
    error_event: bool = False
    cut_after: int | None = None
    """The number of chunks after which the connection closes."""
    output_tokens: int | None = None
    """The number that usage reports; None for the number of tokens that was asked for."""
    close: bool = False
    """Whether the answer asks the client not to keep the connection."""


@dataclass
class FakeServer:
    """The server: its script by the number of the POST, and a record of all requests."""

    url: str = ""
    script: Callable[[int], Answer] = lambda number: Answer()
    gets: dict[str, Any] = field(
        default_factory=lambda: {
            "/v1/models": {"data": [{"id": "fake-model"}]},
            "/version": {"version": "1.2.3"},
        }
    )
    """The answers to GET by path, as JSON objects or text."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    connections: int = 0
    drop_idle: bool = False
    """Whether a kept connection is closed without an answer when its next request arrives."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        served = 0
        try:
            while head := await _head(reader):
                if served and self.drop_idle:
                    return
                served += 1
                self.heads.append(head)
                method, path, _ = head.split(" ", 2)
                length = next(
                    int(line.split(":")[1])
                    for line in head.lower().split("\r\n")
                    if line.startswith("content-length")
                )
                body = await reader.readexactly(length)
                if method == "GET":
                    self._get(path, writer)
                elif not await self._post(path, json.loads(body), writer):
                    return
        except ConnectionError:
            pass  # the client disconnected, as it does after an error
        finally:
            writer.close()

    def _get(self, path: str, writer: asyncio.StreamWriter) -> None:
        found = self.gets.get(path)
        text = found if isinstance(found, str) else json.dumps(found)
        _whole(writer, 404 if found is None else 200, text)

    async def _post(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Answer a POST; return whether to keep the connection."""
        answer = self.script(len(self.bodies))
        self.bodies.append(body)
        self.times.append(time.perf_counter())
        if answer.status != 200:
            _whole(writer, answer.status, '{"error": {"message": "no", "code": "refused"}}')
            return True
        chat = path.endswith("chat/completions")
        extra = "connection: close\r\n" if answer.close else ""
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n%s\r\n" % extra.encode()
        )
        for number, delay in enumerate(answer.delays):
            if answer.cut_after == number:
                return False
            await asyncio.sleep(delay)
            last = number == len(answer.delays) - 1
            choice = {"delta": {"content": "x"}} if chat else {"text": "x"}
            choices = [
                {"index": index, "finish_reason": "length" if last else None, **choice}
                for index in range(body.get("n", 1))
            ]
            _event(writer, {"choices": choices, "usage": None})
        if answer.error_event:
            _event(writer, {"error": {"message": "died", "code": "engine_dead"}})
        asked = body["max_completion_tokens" if chat else "max_tokens"] * body.get("n", 1)
        usage = {
            "prompt_tokens": 10,
            "completion_tokens": asked if answer.output_tokens is None else answer.output_tokens,
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        _event(writer, {"choices": [], "usage": usage})
        _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return not answer.close


async def _head(reader: asyncio.StreamReader) -> str:
    try:
        return (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return ""


def _whole(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    content = text.encode()
    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(content)) + content)


def _event(writer: asyncio.StreamWriter, fields: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(fields).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


@asynccontextmanager
async def fake_server(**options: Any) -> AsyncIterator[FakeServer]:
    fake = FakeServer(**options)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()
