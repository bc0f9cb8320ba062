"""Test that the client survives faults that only an engine in its own process can have."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import zmq

from quire.engine.config import EngineConfig
from quire.engine.errors import EngineNotReadyError
from quire.engine.outputs import SequenceOutput
from quire.engine.process import process_client, wire
from quire.engine.process.engine_handle import EngineHandle
from quire.engine.process.process_client import ProcessEngineClient
from quire.engine.process.streams import MAX_DEATHS

from .. import fakes
from ..clients import Observer, collect, tokens_of
from ..fakes import CRASH, EXIT, HANG, LOSE, SLOW, expected_tokens, make_request

FAKES = str(Path(fakes.__file__).parent)


@pytest.fixture
def observer() -> Observer:
    return Observer()


@contextlib.asynccontextmanager
async def running(
    observer: Observer | None = None, *, stall_timeout: float = 1.0, max_restarts: int = 2
) -> AsyncIterator[ProcessEngineClient]:
    client = ProcessEngineClient(
        EngineConfig(model="fake"),
        core="fakes:build_core",
        observer=observer,
        stall_timeout=stall_timeout,
        max_restarts=max_restarts,
    )
    await client.start()
    await client.wait_ready()
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture(autouse=True)
def importable_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", FAKES)
    monkeypatch.setattr(process_client, "FIRST_DELAY_SECONDS", 0.02)


@pytest.fixture
async def client(observer: Observer) -> AsyncIterator[ProcessEngineClient]:
    async with running(observer) as client:
        yield client


def pid_of(client: ProcessEngineClient) -> int:
    assert client._engine is not None
    return client._engine.pid


async def until_ready(client: ProcessEngineClient) -> None:
    async with asyncio.timeout(20):
        while not client.health().ready:
            await asyncio.sleep(0.01)


def assert_engine_dead(outputs: list[SequenceOutput]) -> None:
    error = outputs[-1].error
    assert outputs[-1].finish_reason == "error"
    assert error is not None and error.code == "engine_dead"


async def test_streams_go_on_after_their_engine_was_killed(
    client: ProcessEngineClient, observer: Observer
) -> None:
    requests = [make_request(SLOW, max_tokens=60, n=n) for n in (1, 2, 3)]
    streams = [asyncio.create_task(collect(client, request)) for request in requests]
    await asyncio.sleep(0.2)
    pid = pid_of(client)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    async with asyncio.timeout(1):
        while client.health().ready:
            await asyncio.sleep(0.01)
    assert client.health().alive
    with pytest.raises(EngineNotReadyError):
        await collect(client, make_request())
    await until_ready(client)
    print(f"ready again after {time.monotonic() - killed:.3f} s")
    for request, stream in zip(requests, streams, strict=True):
        outputs = await stream
        for choice in range(request.sampling_params.n):
            assert tokens_of(outputs, choice) == expected_tokens(request, choice)
        assert {output.request_id for output in outputs} == {request.request_id}
        assert [output.finish_reason for output in outputs].count("length") == (
            request.sampling_params.n
        )
    assert client.health().restarts == observer.restarts == 1
    assert len(client._streams) == 0 and not client._streams._sent


@pytest.mark.parametrize("free", [0, 1, 4])
async def test_a_crash_while_descriptors_are_exhausted_is_not_the_end(
    client: ProcessEngineClient, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step of the restart fails for want of a descriptor, it is tried again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        os.kill(pid_of(client), signal.SIGKILL)
        async with asyncio.timeout(5):
            while client.health().restarts < 1:
                await asyncio.sleep(0.01)
        taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(free)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken, default=0) + 1, limits[1]))
        while True:
            try:
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        for descriptor in taken:
            os.close(descriptor)
        async with asyncio.timeout(5):
            while client.health().restarts < 2:
                await asyncio.sleep(0.01)
        assert client.health().alive
    await until_ready(client)
    request = make_request()
    assert tokens_of(await collect(client, request)) == expected_tokens(request)
    assert not list(tmp_path.iterdir())  # the folders of its sockets are gone, too


@pytest.mark.parametrize("fault", [CRASH, EXIT])
async def test_a_request_that_kills_engines_ends_and_its_neighbours_go_on(
    fault: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(max_restarts=5) as client:
        neighbours = [make_request(SLOW, max_tokens=40) for _ in range(3)]
        streams = [asyncio.create_task(collect(client, request)) for request in neighbours]
        await asyncio.sleep(0.1)
        poison = make_request(fault)
        outputs = await collect(client, poison)
        assert_engine_dead(outputs)
        assert len(outputs) == 1 and outputs[0].error is not None
        assert poison.request_id in outputs[0].error.message and poison.request_id in caplog.text
        for request, stream in zip(neighbours, streams, strict=True):
            assert tokens_of(await stream) == expected_tokens(request)
        assert client.health().restarts == MAX_DEATHS + 1


async def test_an_engine_that_fails_again_and_again_is_given_up(
    client: ProcessEngineClient,
) -> None:
    stream = asyncio.create_task(collect(client, make_request(SLOW, max_tokens=10_000)))
    await asyncio.sleep(0.1)
    for restarts in range(3):
        os.kill(pid_of(client), signal.SIGKILL)
        async with asyncio.timeout(5):
            while client.health().ready:
                await asyncio.sleep(0.01)
        if restarts < 2:
            await until_ready(client)
    assert_engine_dead(await stream)
    async with asyncio.timeout(5):
        while client.health().alive:
            await asyncio.sleep(0.01)
    health = client.health()
    assert not health.ready and "given up" in health.reason and health.restarts == 2
    await asyncio.wait_for(client.wait_given_up(), 1)
    with pytest.raises(EngineNotReadyError, match="given up"):
        await collect(client, make_request())


async def test_streams_end_when_the_engine_is_given_up(client: ProcessEngineClient) -> None:
    client._max_restarts = 0
    stream = asyncio.create_task(collect(client, make_request(SLOW, max_tokens=10_000)))
    await asyncio.sleep(0.1)
    os.kill(pid_of(client), signal.SIGKILL)
    assert_engine_dead(await asyncio.wait_for(stream, 5))
    assert not client.health().alive


async def test_what_happens_to_a_request_while_no_engine_has_it(
    client: ProcessEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deadlines count, choices can be aborted, and a closed stream leaves nothing behind."""
    monkeypatch.setattr(process_client, "FIRST_DELAY_SECONDS", 0.6)
    now = time.monotonic()
    expiring = replace(make_request(SLOW, max_tokens=10_000), deadline=now + 0.5)
    waiting = replace(
        make_request(SLOW, max_tokens=10_000), arrival_time=now, queue_deadline=now + 0.2
    )
    aborted = make_request(SLOW, max_tokens=60, n=2)
    closed = make_request(SLOW, max_tokens=10_000)
    streams = [
        asyncio.create_task(collect(client, request))
        for request in (expiring, waiting, aborted, closed)
    ]
    await asyncio.sleep(0.1)
    client.abort(aborted.request_id, 0)  # reaches an engine that does not live to act on it
    os.kill(pid_of(client), signal.SIGKILL)
    async with asyncio.timeout(1):
        while client.health().ready:
            await asyncio.sleep(0.01)
    streams[3].cancel()
    codes = []
    for outputs in (await streams[0], await streams[1]):
        assert outputs[-1].error is not None
        codes.append(outputs[-1].error.code)
    assert codes == ["request_timeout", "queue_timeout"]
    assert not client.health().ready
    outputs = await streams[2]
    assert [output.finish_reason for output in outputs if output.choice == 0][-1] == "abort"
    assert tokens_of(outputs, 1) == expected_tokens(aborted, 1)
    await asyncio.gather(streams[3], return_exceptions=True)
    assert len(client._streams) == 0


@pytest.mark.parametrize("fault", [HANG, LOSE])
async def test_stalled_engine_is_restarted(capfd: pytest.CaptureFixture[str], fault: int) -> None:
    # Started here and not in a fixture, because pytest gives each phase another stderr.
    async with running(stall_timeout=0.6, max_restarts=4) as client:
        stream = asyncio.create_task(collect(client, make_request(fault)))
        alive = True
        async with asyncio.timeout(20):
            while not stream.done():
                alive = alive and client.health().alive
                await asyncio.sleep(0.01)
        assert_engine_dead(await stream)
        assert not alive
        await until_ready(client)
        health = client.health()
        assert health.alive and health.restarts == MAX_DEATHS + 1
        request = make_request()
        assert tokens_of(await collect(client, request)) == expected_tokens(request)
    dump = capfd.readouterr().err
    assert "Current thread" in dump
    assert ("fakes.py" in dump) == (fault == HANG)


async def test_long_idle_and_a_blocked_loop_are_not_taken_for_a_stall(
    client: ProcessEngineClient,
) -> None:
    await asyncio.sleep(1.5)
    time.sleep(1.5)  # on purpose: this blocks the event loop
    await asyncio.sleep(0.6)
    assert client.health().ready and client.health().restarts == 0


async def test_reset_fails_when_the_engine_dies(client: ProcessEngineClient) -> None:
    pid = pid_of(client)
    os.kill(pid, signal.SIGSTOP)
    reset = asyncio.create_task(client.reset_prefix_cache())
    await asyncio.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Exception, match="died"):
        await reset


async def test_random_bytes_on_the_socket_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineHandle, "hide_socket", lambda self: None)
    async with running() as client:
        await _send_random_bytes(client)


async def _send_random_bytes(client: ProcessEngineClient) -> None:
    engine = client._engine
    assert engine is not None
    rng = random.Random(0)
    request = make_request(SLOW, max_tokens=100)
    stream = asyncio.create_task(collect(client, request))
    genuine = wire.encode(wire.Add.sent(make_request(), time.monotonic()))
    for _ in range(200):
        engine._socket.send(rng.randbytes(rng.randrange(200)))
        garbled = bytearray(genuine)
        garbled[rng.randrange(len(garbled))] = rng.randrange(256)
        engine._socket.send(bytes(garbled))
        engine._socket.send_multipart([b"", genuine])
    stranger = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    stranger.connect(engine._socket.get(zmq.LAST_ENDPOINT))
    stranger.send(wire.encode(wire.Abort(request.request_id, None)))
    path = engine._socket.get(zmq.LAST_ENDPOINT).decode().rstrip("\0").removeprefix("ipc://")
    _, writer = await asyncio.open_unix_connection(path)
    writer.write(rng.randbytes(100_000))
    await asyncio.sleep(0.2)
    writer.close()
    stranger.close(linger=0)
    assert Path(path).parent.stat().st_mode & 0o777 == 0o700
    assert tokens_of(await stream) == expected_tokens(request)
    assert client.health().ready and client.health().restarts == 0


async def test_close_leaves_nothing_behind(client: ProcessEngineClient) -> None:
    engine, pid = client._engine, pid_of(client)
    assert engine is not None
    path = engine._socket.get(zmq.LAST_ENDPOINT).decode().rstrip("\0").removeprefix("ipc://")
    assert not Path(path).parent.exists()  # removed when the engine became ready
    start = time.monotonic()
    await client.close()
    assert time.monotonic() - start < 1.0  # it ended when asked, and was not killed
    assert not psutil.pid_exists(pid)


async def test_close_ends_a_hung_engine(client: ProcessEngineClient) -> None:
    pid = pid_of(client)
    stream = asyncio.create_task(collect(client, make_request(HANG)))
    await asyncio.sleep(0.1)
    await client.close()
    assert_engine_dead(await stream)
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("first_token", [100, HANG], ids=["idle", "hung"])
def test_engine_dies_with_its_parent(first_token: int, tmp_path: Path) -> None:
    """Kill the parent, so that none of its own clean-up can run."""
    script = f"""
        import asyncio, fakes
        from quire.engine.config import EngineConfig
        from quire.engine.process.process_client import ProcessEngineClient

        async def main():
            client = ProcessEngineClient(EngineConfig(model="fake"), core="fakes:build_core")
            await client.start()
            await client.wait_ready()
            print(client._engine.pid, flush=True)
            async for _ in client.generate(fakes.make_request({first_token})):
                pass
            await asyncio.sleep(60)

        asyncio.run(main())
    """
    with subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": FAKES, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.3)
        assert engine.is_running()
        parent.kill()
    deadline = time.monotonic() + 5
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.02)


def test_engine_process_imports_no_torch_before_its_core() -> None:
    code = (
        "import sys, quire.engine.process.process_client, quire.engine.process.engine_process\n"
        "print([m for m in ('torch', 'pydantic', 'fastapi', 'prometheus_client', 'uvicorn') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
