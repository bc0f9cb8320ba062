"""Test links between machines: tcp with keys, and what an engine does when a client is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.errors import ConfigurationError, EngineNotReadyError
from quire.engine.fleet.network_client import NetworkEngineClient
from quire.engine.network import keys
from quire.engine.network.keys import Endpoint, KeyPair, require_loopback
from quire.engine.outputs import one_token
from quire.engine.process import wire
from quire.engine.process.engine_handle import EngineLink
from quire.engine.process.engine_process import _bind
from quire.engine.process.process_client import ProcessEngineClient
from quire.engine.process.stream import MAX_DEATHS
from quire.engine.process.streams import StreamTable

from .. import fakes
from ..clients import Observer


@pytest.fixture
async def owner(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ProcessEngineClient]:
    monkeypatch.setenv("PYTHONPATH", str(Path(fakes.__file__).parent))
    owner = ProcessEngineClient(
        EngineConfig(model="fake"),
        core="fakes:build_core",
        observer=Observer(),
        listen="tcp://127.0.0.1:*",
    )
    await owner.start()
    await owner.wait_ready()
    try:
        yield owner
    finally:
        await owner.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def nowhere(request: object, began_at: object) -> tuple[NetworkEngineClient, fakes.Request]:
    raise EngineNotReadyError("no engine")


async def test_only_a_client_with_an_admitted_key_gets_in(owner: ProcessEngineClient) -> None:
    endpoint = owner.endpoint
    assert endpoint is not None and endpoint.address.startswith("tcp://127.0.0.1:")
    known, strangers = KeyPair.make(), KeyPair.make()
    owner.send(wire.Admit(known.public))
    lost = 0

    def count() -> None:
        nonlocal lost
        lost += 1

    # 1. Without its key being admitted, or with another idea of the engine's key, it is refused.
    # Where nobody listens, there is no link either.
    other = Endpoint(endpoint.address, KeyPair.make().public)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = Endpoint(f"tcp://127.0.0.1:{unused.getsockname()[1]}", endpoint.public_key)
    for one, where in ((strangers, endpoint), (known, other), (known, nobody)):
        client = NetworkEngineClient("stranger", one, None, StreamTable(nowhere))
        client.on_lost = count
        client.connect(where, 0)
        await until(lambda client=client: not client.is_linked)
        assert not client.is_ready
        await client.close()
    assert lost >= 3
    # 2. An admitted one gets in, and knows the engine.
    client = NetworkEngineClient("front", known, None, StreamTable(nowhere))
    client.connect(endpoint, 0)
    await until(lambda: client.is_ready)
    assert client.info.num_blocks == 1000
    # 3. When it is gone, the engine ends its requests.
    client.add_request(fakes.make_request(fakes.SLOW, max_tokens=10_000))
    await until(lambda: (stats := owner.stats()) is not None and stats.num_running == 1)
    await client.close()
    assert not client.is_ready and not client.is_linked
    await until(lambda: (stats := owner.stats()) is not None and stats.num_running == 0)


async def test_a_silent_machine_is_noticed(
    owner: ProcessEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "HEARTBEAT_MS", 100)
    monkeypatch.setattr(keys, "HEARTBEAT_TIMEOUT_MS", 400)
    pair = KeyPair.make()
    owner.send(wire.Admit(pair.public))
    client = NetworkEngineClient("front", pair, None, StreamTable(nowhere))
    assert owner.endpoint is not None and owner._engine is not None
    client.connect(owner.endpoint, 0)
    await until(lambda: client.is_ready)
    os.kill(owner._engine.pid, signal.SIGSTOP)
    began = time.monotonic()
    await until(lambda: not client.is_linked)
    assert not client.is_ready and time.monotonic() - began < 3
    os.kill(owner._engine.pid, signal.SIGCONT)
    await client.close()


@pytest.mark.parametrize(
    ("address", "is_refused"),
    [
        ("tcp://10.0.0.5:7000", True),
        ("tcp://0.0.0.0:*", True),
        ("tcp://[::]:7000", True),
        ("tcp://quire.example:7000", True),
        ("tcp://127.0.0.1:7000", False),
        ("tcp://[::1]:7000", False),
        ("ipc:///tmp/engine", False),
    ],
)
def test_addresses_of_other_machines_need_keys(address: str, is_refused: bool) -> None:
    if not is_refused:
        require_loopback(address)
        return
    for use in (require_loopback, EngineLink, _bind):
        with pytest.raises(ConfigurationError, match="needs keys"):
            use(address)  # type: ignore[operator]


class _Place:
    """An engine that computes nothing."""

    def __init__(self) -> None:
        self.info = fakes.FakeCore(EngineConfig(model="fake")).info
        self.requests: list[fakes.Request] = []

    def add_request(self, request: fakes.Request) -> None:
        self.requests.append(request)

    def abort_request(self, request_id: str, choice: int | None) -> None:
        raise AssertionError("nothing is aborted")


async def test_engines_that_leave_are_no_deaths() -> None:
    """A stream may outlive any number of drains, and still only so many deaths."""
    place = _Place()
    table = StreamTable(lambda request, began_at: (place, request))
    outputs = []

    async def read() -> None:
        async for output in table.generate(fakes.make_request(100, max_tokens=1000)):
            outputs.append(output)

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    leaves, deaths = 12, MAX_DEATHS + 1
    for turn in range(leaves + deaths):
        sent = place.requests[-1].request_id
        table.begun([sent])
        if turn < leaves:
            table.deliver([one_token(sent, 0, 100 + turn)])
        table.detach(place, is_death=turn >= leaves)
    await task
    assert place.requests[leaves].resume == (tuple(range(100, 100 + leaves)),)
    assert len(place.requests) == leaves + deaths
    assert outputs[-1].error is not None and f"died {deaths} times" in outputs[-1].error.message
