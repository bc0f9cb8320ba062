"""More connections than descriptors: probes and clients with keys are still served."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.engine.errors import ConfigurationError
from quire.server.serving import connections, system_limits
from quire.server.serving.connections import Connections
from quire.server.serving.system_limits import MIN_DESCRIPTORS, PROBE_CONNECTIONS

from ..test_cli import SLOW, Server, launch


def limited(soft: int, hard: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def serving(soft: int, hard: int, *flags: str) -> Iterator[Server]:
    with launch(*flags, preexec_fn=limited(soft, hard)) as process:
        server = Server(process)
        with server.http:
            yield server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(200, 256, "--api-key", "sk-a") as server:
        yield server


def test_the_soft_limit_is_raised_to_the_hard_one(server: Server) -> None:
    text = Path(f"/proc/{server.process.pid}/limits").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("Max open files")]
    assert line.split()[3:5] == ["256", "256"]


@pytest.mark.parametrize("sent", [b"", b"GET /live HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HT"])
def test_idle_connections_without_a_key_shut_nobody_out(server: Server, sent: bytes) -> None:
    """Whether they say nothing, have asked something that needs no key, or begin a request."""
    server.http.headers["authorization"] = "Bearer sk-a"
    address = str(server.http.base_url.host), server.http.base_url.port or 0
    with contextlib.ExitStack() as stack, server.stream(SLOW, 400) as events:
        others: list[socket.socket] = []
        for _ in range(400):
            other = stack.enter_context(socket.create_connection(address, timeout=5))
            with contextlib.suppress(ConnectionError):  # it has been given up already
                other.sendall(sent)
            others.append(other)
        for _ in range(5):
            for path in ("/live", "/metrics", "/v1/models"):
                with socket.create_connection(address, timeout=5) as probe:
                    probe.sendall(
                        f"GET {path} HTTP/1.1\r\nHost: a\r\nauthorization: Bearer sk-a\r\n"
                        "connection: close\r\n\r\n".encode()
                    )
                    assert b"200 OK" in probe.recv(100), path
            time.sleep(0.02)
        assert next(events) != "[DONE]"  # the stream went on all the while


class _Transport:
    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class _Connection:
    def __init__(self, *, waits: bool, key: bool) -> None:
        self.is_waiting, self.has_shown_key = waits, key
        self.transport = _Transport()
        self.probes_only = False

    def serve_probes_only(self) -> None:
        self.probes_only = True


def add(open_ones: Connections, *, waits: bool, key: bool = False) -> _Connection:
    connection: Any = _Connection(waits=waits, key=key)
    open_ones.add(connection)
    return connection  # type: ignore[no-any-return]


def test_those_without_a_key_give_way_first_and_busy_ones_never() -> None:
    open_ones = Connections(4)
    busy = add(open_ones, waits=False)
    keyed = add(open_ones, waits=True, key=True)
    old, new = add(open_ones, waits=True), add(open_ones, waits=True)
    given_up = []
    for _ in range(3):
        latest = add(open_ones, waits=False, key=True)
        assert not (latest.transport.aborted or latest.probes_only)
        given_up.append([one.transport.aborted for one in (old, new, keyed, busy)])
    assert given_up == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
    ]
    # Now all are busy: a few more may ask the probes, and the others are closed.
    for _ in range(PROBE_CONNECTIONS):
        probe = add(open_ones, waits=False)
        assert probe.probes_only and not probe.transport.aborted
    assert add(open_ones, waits=False).transport.aborted


def test_many_are_given_up_at_once_so_that_the_search_is_rare() -> None:
    open_ones = Connections(640)
    waiting = [add(open_ones, waits=True) for _ in range(640)]
    add(open_ones, waits=False)
    assert sum(one.transport.aborted for one in waiting) == 11
    assert len(open_ones) == 630


async def test_only_probes_are_answered_where_nothing_is_left() -> None:
    paths: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        paths.append(scope["path"])

    guarded = connections.ProbesOnlyMiddleware(app, "/prefix")
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    for path, state in (
        ("/prefix/live", {"probes_only": True}),
        ("/metrics", {"probes_only": True}),
        ("/v1/models", {}),
        ("/v1/chat/completions", {"probes_only": True}),
    ):
        scope = {"type": "http", "path": path, "state": state, "headers": []}
        await guarded(scope, None, send)  # type: ignore[arg-type]
    assert paths == ["/prefix/live", "/metrics", "/v1/models"]
    assert sent[0]["status"] == 429 and (b"connection", b"close") in sent[0]["headers"]


def test_too_few_descriptors_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    few = MIN_DESCRIPTORS - 1
    monkeypatch.setattr(system_limits.resource, "getrlimit", lambda _: (few, few))
    with pytest.raises(ConfigurationError, match=f"only {few} open files are allowed") as caught:
        system_limits.raise_descriptor_limit()
    assert "\n" not in caught.value.message


def test_too_few_threads_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    system_limits.check_threads()
    before = threading.active_count()
    start, started = threading.Thread.start, []

    def limited_start(thread: threading.Thread) -> None:
        if len(started) == 5:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited_start)
    with pytest.raises(ConfigurationError, match="only 5 threads can be started") as caught:
        system_limits.check_threads()
    assert "\n" not in caught.value.message
    assert threading.active_count() == before
