"""A log that nobody reads, through a pipe or a socket: the server goes on."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.engine.process import json_logs
from quire.engine.process.json_logs import MAX_UNWRITTEN, NonBlockingHandler, stderr_handler

from .openai_http import until
from .test_cli import Server, launch

SIZE = 1000
"""Characters of an entry."""


class Ends:
    """Both ends of a pipe or of a pair of sockets; `read` empties it."""

    def __init__(self, kind: str) -> None:
        if kind == "pipe":
            self.ours, self.theirs = os.pipe()
        else:
            first, second = socket.socketpair()
            self.ours, self.theirs = first.detach(), second.detach()
        os.set_blocking(self.ours, False)

    def read(self) -> str:
        parts = []
        while True:
            try:
                part = os.read(self.ours, 2**20)
            except BlockingIOError:
                part = b""
            if not part:
                return b"".join(parts).decode()
            parts.append(part)


@pytest.fixture(params=["pipe", "socket"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    both = Ends(request.param)
    yield both
    os.close(both.ours)


@pytest.fixture
def handler(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> Iterator[NonBlockingHandler]:
    with os.fdopen(ends.theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        handler = stderr_handler()
        assert isinstance(handler, NonBlockingHandler)
        yield handler
        handler.close()


def write(handler: logging.Handler, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        text = f"{number:06d}" + "x" * (SIZE - 6)
        handler.emit(logging.LogRecord("n", logging.INFO, "", 0, text, None, None))


def numbers(text: str) -> list[int]:
    lines = text.splitlines()
    assert all(len(line) == SIZE for line in lines if "missing" not in line)
    return [int(line[:6]) for line in lines if "missing" not in line]


def test_entries_wait_for_a_reader_then_are_dropped_and_counted(
    ends: Ends, handler: NonBlockingHandler
) -> None:
    began = time.monotonic()
    write(handler, 3000)
    assert time.monotonic() - began < 5
    assert os.get_blocking(ends.theirs)  # other processes share the descriptor
    text = ends.read()
    write(handler, 1, 3000)
    text += ends.read()
    while len(part := ends.read()) + handler._flush():
        text += part
    text += ends.read()
    (notice,) = [line for line in text.splitlines() if "missing" in line]
    seen = numbers(text)
    assert int(notice.split()[0]) == 3001 - len(seen) > 0
    assert seen == [*range(len(seen) - 1), 3000]  # none is cut, and the order is kept
    assert len(seen) * SIZE > MAX_UNWRITTEN


def test_a_reader_that_has_gone_does_no_harm(handler: NonBlockingHandler, ends: Ends) -> None:
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, ends.ours)  # closes the reading end
    os.close(nowhere)
    write(handler, 10)
    assert not handler._unwritten


def test_what_waits_is_written_at_the_end_but_not_for_ever(
    ends: Ends, handler: NonBlockingHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_logs, "LAST_SECONDS", 0.05)
    write(handler, 400)
    began = time.monotonic()
    handler.flush()
    assert 0.04 < time.monotonic() - began < 2
    assert handler._unwritten


def test_files_are_written_as_usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "log", "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert type(stderr_handler()) is logging.StreamHandler


def test_a_server_whose_log_nobody_reads_goes_on() -> None:
    with launch("--enable-log-requests") as process:
        server = Server(process)
        # From here on nobody reads the pipe, of 64 KiB; each request logs some 300 bytes.
        body = {"model": "fake", "prompt": [20, 21], "max_tokens": 1}
        with server.http as client:
            for _ in range(240):
                assert client.post("/v1/completions", json=body).status_code == 200
            assert client.get("/live").status_code == 200
        process.terminate()
        until(lambda: process.poll() is not None)
        assert process.wait() == 0
