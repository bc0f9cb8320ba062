"""An engine without a model that serves its messages in a thread: the real core, scheduler and
EngineServer over the paged fake worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import zmq

from quire.engine.config import EngineConfig, WorkerInfo
from quire.engine.core.engine_core import EngineCore
from quire.engine.events.kv_publisher import KVPublisher
from quire.engine.process import engine_process, wire

from ..paged_fake import PagedFakeWorker

WAIT_MS = 10_000


class LoadedWorker(PagedFakeWorker):
    """The paged fake worker with what a core asks for at its start."""

    def load(self) -> WorkerInfo:
        return WorkerInfo(
            architecture="Fake",
            device="cpu",
            dtype="float32",
            num_parameters=1,
            vocab_size=100_000,
            max_model_len=4096,
            kv_bytes_per_token=1,
            max_num_batched_tokens=256,
            is_asynchronous=False,
            eos_token_ids=(2,),
        )

    def profile(self) -> int:
        return self.null_block

    def max_num_seqs(self) -> int:
        return 256

    def block_bytes(self) -> int:
        return 16

    def read_adapter(self, source: Any) -> Any: ...

    def hold_adapter(self, adapter_id: int, adapter: Any) -> None: ...

    def drop_adapter(self, adapter_id: int) -> None: ...


class Link:
    """A client's socket. Only messages that say something are kept."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.SyncSocket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self.send(wire.Hello(wire.PROTOCOL))
        self.ready = self.receive()

    def send(self, message: wire.ToEngine) -> None:
        self._socket.send(wire.encode(message))

    def receive(self) -> wire.FromEngine:
        assert self._socket.poll(WAIT_MS), "the engine is silent"
        return wire.decode_from_engine(self._socket.recv())

    def receive_until(self, *kinds: type[wire.FromEngine]) -> Any:
        while not isinstance(message := self.receive(), kinds):
            pass
        return message

    def close(self) -> None:
        self._socket.close()


@contextmanager
def local_engine(
    folder: Path, num_blocks: int = 64, publisher: KVPublisher | None = None
) -> Iterator[Callable[[], Link]]:
    """Serve an engine, and yield a function that connects a client to it."""
    address = f"ipc://{folder}/engine-{os.urandom(4).hex()}"
    config = EngineConfig(model="none", device="cpu", max_num_seqs=8, speculation="off")
    core = EngineCore(config, LoadedWorker(num_blocks, config.block_size))
    reading, writing = os.pipe()
    socket = engine_process._bind(address)
    stdin = SimpleNamespace(fileno=lambda: reading)
    with mock.patch.object(engine_process.sys, "stdin", stdin):
        server = engine_process.EngineServer(socket, publisher)
    thread = threading.Thread(target=server.run, args=(core,))
    thread.start()
    links: list[Link] = []

    def connect() -> Link:
        links.append(Link(address))
        return links[-1]

    try:
        yield connect
    finally:
        for link in links:
            link.close()
        os.close(writing)
        thread.join()
        os.close(reading)
        socket.close()
