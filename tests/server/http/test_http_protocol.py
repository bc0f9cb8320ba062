"""Guards that uvicorn lacks, against slow heads, slow bodies and too many headers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import ClassVar

import pytest
import uvicorn
import uvloop
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.server.http.http_protocol import (
    FREE_CHUNKS,
    MAX_EVENTS,
    MAX_HEADER_BYTES,
    MIN_BODY_BYTES,
    GuardedH11Protocol,
    HeaderCountMiddleware,
)


class QuickProtocol(GuardedH11Protocol):
    head_seconds = 0.4
    body_seconds = 0.4
    linger_bytes = 256 * 1024
    linger_seconds = 0.4
    write_seconds = 0.2
    num_turns = 0
    lost: ClassVar[list[GuardedH11Protocol]] = []

    def _take_turn(self) -> None:
        QuickProtocol.num_turns += 1
        super()._take_turn()

    def connection_lost(self, exc: Exception | None) -> None:
        QuickProtocol.lost.append(self)
        super().connection_lost(exc)


class App:
    """An application that reads the whole body and returns its length after `pause` seconds."""

    def __init__(self) -> None:
        self.pause = 0.0
        self.last_message: Message | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = 0
        while True:
            message = self.last_message = await receive()
            if message["type"] == "http.disconnect":
                return
            length += len(message["body"])
            if not message["more_body"]:
                break
        await asyncio.sleep(self.pause)
        body = str(length).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def app() -> App:
    return App()


@contextlib.asynccontextmanager
async def serving_on_port(app: ASGIApp) -> AsyncIterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        HeaderCountMiddleware(app),
        http=QuickProtocol,
        lifespan="off",
        log_config=None,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=60,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        server.force_exit = True
        await serving


@pytest.fixture
async def port(app: App) -> AsyncIterator[int]:
    async with serving_on_port(app) as port:
        yield port


async def exchange(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send the parts with pauses between them; return everything until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(pause)
        async with asyncio.timeout(5):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"
CLOSE = b"connection: close\r\n"


async def test_an_ordinary_request(port: int) -> None:
    answer = await exchange(port, HEAD + CLOSE + b"content-length: 3\r\n\r\nabc")
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n3")


async def test_silent_connection_is_closed(port: int) -> None:
    assert await exchange(port) == b""


async def test_slow_head_is_cut(port: int) -> None:
    """Each part arrives in time, but the head as a whole does not."""
    parts = [b"x-%d: y\r\n" % number for number in range(8)]
    assert await exchange(port, HEAD, *parts, CLOSE + b"\r\n", pause=0.1) == b""


async def test_slow_head_of_a_second_request_is_cut(port: int) -> None:
    first = HEAD + b"content-length: 0\r\n\r\n"
    answer = await exchange(port, first, HEAD, pause=0.1)
    assert answer.count(b"HTTP/1.1 200") == 1


async def test_idle_connection_between_requests_is_kept(port: int) -> None:
    first = HEAD + b"content-length: 0\r\n\r\n"
    answer = await exchange(port, first, HEAD + CLOSE + b"content-length: 0\r\n\r\n", pause=0.8)
    assert answer.count(b"HTTP/1.1 200") == 2


async def test_slow_body_is_cut_and_the_app_sees_a_disconnect(port: int, app: App) -> None:
    head = HEAD + b"content-length: 100\r\n\r\n"
    assert await exchange(port, head, *[b"x"] * 8, pause=0.1) == b""
    await asyncio.sleep(0.05)
    assert app.last_message is not None and app.last_message["type"] == "http.disconnect"


async def test_large_body_at_a_fair_rate_is_read(port: int) -> None:
    part = b"x" * MIN_BODY_BYTES
    head = HEAD + CLOSE + b"content-length: %d\r\n\r\n" % (8 * len(part))
    answer = await exchange(port, head, *[part] * 8, pause=0.15)
    assert answer.endswith(b"\r\n\r\n%d" % (8 * len(part)))


async def test_slow_answer_is_not_cut(port: int, app: App) -> None:
    app.pause = 1.0
    answer = await exchange(port, HEAD + CLOSE + b"content-length: 1\r\n\r\nx")
    assert answer.startswith(b"HTTP/1.1 200")


CHUNKED = HEAD + CLOSE + b"transfer-encoding: chunked\r\n\r\n"


async def test_tiny_chunks_are_read_a_few_at_a_time(port: int) -> None:
    QuickProtocol.num_turns = 0
    answer = await exchange(port, CHUNKED + b"1\r\nx\r\n" * FREE_CHUNKS + b"0\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n%d" % FREE_CHUNKS)
    assert QuickProtocol.num_turns >= FREE_CHUNKS / MAX_EVENTS - 8


async def test_the_end_of_the_input_waits_for_chunks_that_are_not_parsed_yet(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(CHUNKED + b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n")
    writer.write_eof()
    assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"\r\n\r\n1000")
    writer.close()


async def test_a_body_of_tiny_chunks_is_refused(port: int) -> None:
    answer = await exchange(port, CHUNKED + b"1\r\nx\r\n" * (FREE_CHUNKS + 200))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    parts = b"80\r\n" + b"x" * 128 + b"\r\n"  # small ones are accepted, in any number
    answer = await exchange(port, CHUNKED + parts * 2 * FREE_CHUNKS + b"0\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n%d" % (256 * FREE_CHUNKS))


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": b"no"})


async def test_a_refused_body_is_read_for_a_while_only() -> None:
    async with serving_on_port(refuse) as port:
        # 1. The rest of a body may come after the answer; the connection is kept.
        first = HEAD + b"content-length: 100000\r\n\r\n"
        second = HEAD + CLOSE + b"content-length: 0\r\n\r\n"
        answer = await exchange(port, first, b"x" * 100_000 + second, pause=0.1)
        assert answer.count(b"HTTP/1.1 401") == 2
        # 2. A client that goes on sending is cut off, whether it sends much or little.
        for part, pause in ((b"x" * 65536, 0.0), (b"x", 0.05)):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + b"content-length: 1000000000\r\n\r\n")
            sent = 0
            async with asyncio.timeout(5):
                with pytest.raises(ConnectionError):
                    while True:
                        writer.write(part)
                        sent += len(part)
                        await writer.drain()
                        await asyncio.sleep(pause)
            assert sent < 20 * 2**20


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_reads_nothing_loses_its_connection(streamed: bool) -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in range(64):
            await send(
                {
                    "type": "http.response.body",
                    "body": b"x" * 2**18,
                    "more_body": streamed or part < 63,
                }
            )

    async with serving_on_port(answer) as port:
        QuickProtocol.lost.clear()
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.transport.pause_reading()
        writer.write(HEAD + b"\r\n")
        async with asyncio.timeout(5):
            while not QuickProtocol.lost:
                await asyncio.sleep(0.02)
        writer.close()


async def test_a_client_that_reads_slowly_gets_its_whole_answer() -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 8 * 2**20})

    async with serving_on_port(answer) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + CLOSE + b"\r\n")
        size = 0
        while part := await reader.read(2**20):
            size += len(part)
            await asyncio.sleep(0.02)
        assert size > 8 * 2**20
        writer.close()


def error_of(answer: bytes) -> dict[str, object]:
    error: dict[str, object] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_too_many_headers(port: int) -> None:
    many = b"".join(b"x-%d: y\r\n" % number for number in range(200))
    answer = await exchange(port, HEAD + many + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431") and "headers" in str(error_of(answer)["message"])


async def test_too_large_head(port: int) -> None:
    answer = await exchange(port, HEAD + b"x: " + b"y" * 2 * MAX_HEADER_BYTES)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")


async def test_bytes_that_are_not_http(port: int) -> None:
    answer = await exchange(port, b"\x16\x03\x01\x00 what is this\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert error_of(answer)["type"] == "invalid_request_error"


async def test_garbage_after_a_request(port: int, app: App) -> None:
    app.pause = 0.3
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    answer = await exchange(port, head, b"no chunk\r\n", pause=0.1)
    assert answer.startswith(b"HTTP/1.1 400")


# -- clients that stop sending, and clients that leave ------------------------------------------


class Streamer:
    """An application that waits `pause` seconds, streams 10 parts, and notes when a client left."""

    def __init__(self, pause: float, between: float) -> None:
        self.pause, self.between = pause, between
        self.left = asyncio.Event()
        self.done = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        answering = asyncio.create_task(self._answer(send))
        gone = asyncio.create_task(receive())
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            answering.cancel()
            self.left.set()
        else:
            gone.cancel()
            self.done.set()

    async def _answer(self, send: Send) -> None:
        await asyncio.sleep(self.pause)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(10):
            await asyncio.sleep(self.between)
            part = b"part%d " % number
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
Scenario = Callable[[Streamer, int], Awaitable[None]]


def run(loop: Callable[[], asyncio.AbstractEventLoop], app: Streamer, scenario: Scenario) -> None:
    """Run `scenario(app, port)` in a loop of this kind, with `app` served in it."""

    async def main() -> None:
        async with serving_on_port(app) as port, asyncio.timeout(10):
            await scenario(app, port)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


async def send_request(port: int, version: bytes = b"1.1") -> socket.socket:
    """Return a connection on which a complete request was sent."""
    client = socket.create_connection(("127.0.0.1", port))
    client.setblocking(False)
    request = b"POST / HTTP/" + version + b"\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
    await asyncio.get_running_loop().sock_sendall(client, request)
    await asyncio.sleep(0.05)
    return client


async def read_all(client: socket.socket) -> bytes:
    parts = []
    while part := await asyncio.get_running_loop().sock_recv(client, 65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("pause", "between"), [(0.0, 0.02), (0.6, 0.0)])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_client_that_stops_sending_gets_its_whole_answer(
    loop: Callable[[], asyncio.AbstractEventLoop], pause: float, between: float, version: bytes
) -> None:
    async def scenario(app: Streamer, port: int) -> None:
        client = await send_request(port, version)
        with client:
            client.shutdown(socket.SHUT_WR)
            answer = await read_all(client)  # which ends, since the server closes its side
        final = answer[answer.index(b" 200 ") :]
        assert all(b"part%d " % number in final for number in range(10))
        interim = answer.count(b"HTTP/1.1 102 ")
        assert interim == 0 if version == b"1.0" else interim >= 1 or pause == 0
        assert interim <= 4  # they become rare
        await app.done.wait()
        assert not app.left.is_set()

    run(loop, Streamer(pause, between), scenario)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("pause", "between"), [(30.0, 0.0), (0.0, 0.2)])
@pytest.mark.parametrize("stops_first", [True, False])
def test_a_client_that_leaves_is_noticed_at_once(
    loop: Callable[[], asyncio.AbstractEventLoop], pause: float, between: float, stops_first: bool
) -> None:
    async def scenario(app: Streamer, port: int) -> None:
        client = await send_request(port)
        if stops_first:
            client.shutdown(socket.SHUT_WR)
            await asyncio.sleep(0.1)
        client.close()
        async with asyncio.timeout(1.5):
            await app.left.wait()

    run(loop, Streamer(pause, between), scenario)


@pytest.mark.parametrize("loop", LOOPS)
def test_requests_in_one_go_before_the_end_of_the_input_are_all_answered(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def scenario(app: Streamer, port: int) -> None:
        one = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(2 * one + one[:-1])  # the third never becomes complete
            client.shutdown(socket.SHUT_WR)
            client.setblocking(False)
            answer = await read_all(client)
        assert answer.count(b"HTTP/1.1 200 ") == 2 and answer.count(b"part9") == 2

    run(loop, Streamer(0.1, 0.0), scenario)
