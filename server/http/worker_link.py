"""The messages between the main process and its HTTP workers, over one socket pair per worker.

    main → worker   Setup, then EngineUpdate · KeysUpdate · AskSamples · Page · Drain · Stop
    worker → main   Up | Failed, then Samples · AskPage

A frame is its length and a message in msgpack. If the link ends, the other process has ended.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from ...engine.process.remote_client import EngineStatus
from ..metrics.metrics_sum import Sample
from ..tenants.tenant import Tenant

_LENGTH_BYTES = 4


class Setup(msgspec.Struct, tag=True):
    """What a worker needs to start.

    `settings` are those of the server, and `folder` holds the workers' private sockets. `listener`
    (the shared socket) and `counters` (the shared memory, see shared_counters.py) are open file
    descriptors. `tenants` are those whose keys are valid.
    """

    settings: dict[str, Any]
    index: int
    engine_name: bytes
    created: int
    folder: str
    listener: int
    counters: int
    tenants: list[Tenant]


class EngineUpdate(msgspec.Struct, tag=True):
    """The state of the engine has changed, or that of one of several."""

    status: EngineStatus
    index: int = 0


class KeysUpdate(msgspec.Struct, tag=True):
    """The file of keys has changed: these are the tenants from now on."""

    tenants: list[Tenant]


class AskSamples(msgspec.Struct, tag=True):
    """Ask for the worker's metrics; it answers with Samples."""


class Page(msgspec.Struct, tag=True):
    """The metrics page of all workers together, and its content type."""

    content: bytes
    media_type: str


class Drain(msgspec.Struct, tag=True):
    """Tell the worker to refuse new requests."""


class Stop(msgspec.Struct, tag=True):
    """Tell the worker to close all connections and exit."""


class Up(msgspec.Struct, tag=True):
    """The worker accepts connections."""


class Failed(msgspec.Struct, tag=True):
    """The worker could not start; `message` is one line for people."""

    message: str


class Samples(msgspec.Struct, tag=True):
    """The metrics of this worker."""

    samples: list[Sample]


class AskPage(msgspec.Struct, tag=True):
    """Ask for the metrics page of all workers; Pages answer in the order of asking."""


ToWorker = Setup | EngineUpdate | KeysUpdate | AskSamples | Page | Drain | Stop
ToMain = Up | Failed | Samples | AskPage

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_encode = msgspec.msgpack.Encoder().encode


class Link(Generic[_In, _Out]):
    """A two-way stream of messages: `_In` is received and `_Out` is sent."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: Any
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[_In] = msgspec.msgpack.Decoder(kind)

    @classmethod
    async def open(cls, end: socket.socket, kind: Any) -> Link[_In, _Out]:
        """Use a connected socket; `kind` is the type of the messages to receive."""
        reader, writer = await asyncio.open_connection(sock=end)
        return cls(reader, writer, kind)

    @classmethod
    async def to_path(cls, path: Path, kind: Any) -> Link[_In, _Out]:
        """Connect to a unix socket. Raises OSError if nobody listens."""
        reader, writer = await asyncio.open_unix_connection(path)
        return cls(reader, writer, kind)

    def send(self, message: _Out) -> None:
        """Send `message`, or do nothing if the other side has gone, which `receive` reports."""
        if not self._writer.is_closing():
            data = _encode(message)
            self._writer.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)

    async def receive(self) -> _In | None:
        """Wait for the next message; None if the other side has gone."""
        try:
            length = await self._reader.readexactly(_LENGTH_BYTES)
            return self._decoder.decode(
                await self._reader.readexactly(int.from_bytes(length, "big"))
            )
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def drain(self) -> None:
        """Wait until the send buffer has room. Raises ConnectionError if the other side is gone."""
        await self._writer.drain()

    def close(self) -> None:
        self._writer.close()
