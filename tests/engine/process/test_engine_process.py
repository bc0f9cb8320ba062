"""Test that the real engine core gives the same when stepped by a process and by a thread."""

from __future__ import annotations

import asyncio
from pathlib import Path

from quire.engine.config import EngineConfig
from quire.engine.process import wire
from quire.engine.process.engine_process import build_core
from quire.engine.process.process_client import ProcessEngineClient

from ..clients import collect, tokens_of
from ..fakes import FakeCore, make_request
from ..inline_client import InlineEngineClient
from ..models import save_model
from ..simulation.engine import SimServer, SimSocket


async def test_real_engine_answers_the_same_in_a_process_and_in_a_thread(tmp_path: Path) -> None:
    save_model("qwen3", tmp_path)
    config = EngineConfig(
        model=str(tmp_path),
        dtype="float32",
        device="cpu",
        kv_cache_memory_bytes=2**22,
        num_threads=1,
    )
    answers = []
    for client in (ProcessEngineClient(config), InlineEngineClient(config, build_core)):
        await client.start()
        info = await client.wait_ready()
        requests = [
            make_request(first, max_tokens=8, n=2, seed=first, ignore_eos=True)
            for first in (3, 4, 5)
        ]
        outputs = await asyncio.gather(*(collect(client, request) for request in requests))
        await client.close()
        answers.append((info, [[tokens_of(o, choice) for choice in range(2)] for o in outputs]))
    assert answers[0] == answers[1]
    assert all(len(tokens) == 8 for request in answers[0][1] for tokens in request)


def test_a_request_of_a_client_that_is_reported_dead_before_it_is_dropped() -> None:
    """Messages of two clients are read in one go, in whatever order the socket has them."""
    socket = SimSocket()
    server = SimServer(socket)
    core = FakeCore(EngineConfig(model="fake"))

    def arrive(client: bytes, message: wire.ToEngine) -> None:
        socket.inbox.append([client, wire.encode(message)])

    arrive(b"main", wire.Hello(wire.PROTOCOL))
    arrive(b"worker", wire.Hello(wire.PROTOCOL))
    server.run(core)  # type: ignore[arg-type]
    mine = make_request(max_tokens=3)
    arrive(b"main", wire.Add(mine))
    arrive(b"main", wire.ClientGone(b"worker"))
    arrive(b"worker", wire.Add(make_request(max_tokens=3)))
    server.run(core)  # type: ignore[arg-type]
    assert core.stats().num_running == 1
    for _ in range(3):
        server.run(core)  # type: ignore[arg-type]
    assert not core.has_work and not server._open
