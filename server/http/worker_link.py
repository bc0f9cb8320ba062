"""What the main process and its HTTP workers say to each other, over one socket pair each.

    main → worker   Setup, then EngineUpdate · AskSamples · Page · Drain · Stop
    worker → main   Up | Failed, then Samples · AskPage

The end of the link is the end of the other side. Frames are msgpack behind their length.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from ...engine.process.remote_client import EngineStatus
from ..metrics_sum import Sample

_LENGTH_BYTES = 4


class Setup(msgspec.Struct, tag=True):
    """`settings` are those of the server; `folder` holds the workers' private sockets, and the
    descriptors `listener` and `loads` are open in the worker."""

    settings: dict[str, Any]
    index: int
    engine_name: bytes
    created: int
    folder: str
    listener: int
    loads: int


class EngineUpdate(msgspec.Struct, tag=True):
    status: EngineStatus


class AskSamples(msgspec.Struct, tag=True):
    """Answered by Samples."""


class Page(msgspec.Struct, tag=True):
    """The metrics of all, and their content type."""

    content: bytes
    media_type: str


class Drain(msgspec.Struct, tag=True):
    """Refuse new requests."""


class Stop(msgspec.Struct, tag=True):
    """Close all connections, and end."""


class Up(msgspec.Struct, tag=True):
    """Connections are accepted."""


class Failed(msgspec.Struct, tag=True):
    """The start failed; `message` is one line for a person."""

    message: str


class Samples(msgspec.Struct, tag=True):
    samples: list[Sample]


class AskPage(msgspec.Struct, tag=True):
    """Answered by Page, in order."""


ToWorker = Setup | EngineUpdate | AskSamples | Page | Drain | Stop
ToMain = Up | Failed | Samples | AskPage

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_encode = msgspec.msgpack.Encoder().encode


class Link(Generic[_In, _Out]):
    """A stream of messages: `kind` in, `_Out` out."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: Any
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[_In] = msgspec.msgpack.Decoder(kind)

    @classmethod
    async def open(cls, end: socket.socket, kind: Any) -> Link[_In, _Out]:
        reader, writer = await asyncio.open_connection(sock=end)
        return cls(reader, writer, kind)

    @classmethod
    async def to_path(cls, path: Path, kind: Any) -> Link[_In, _Out]:
        """Raises OSError where nobody listens."""
        reader, writer = await asyncio.open_unix_connection(path)
        return cls(reader, writer, kind)

    def send(self, message: _Out) -> None:
        """Nothing once the other side is gone: `receive` tells."""
        if not self._writer.is_closing():
            data = _encode(message)
            self._writer.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)

    async def receive(self) -> _In | None:
        """None at the end."""
        try:
            length = await self._reader.readexactly(_LENGTH_BYTES)
            return self._decoder.decode(
                await self._reader.readexactly(int.from_bytes(length, "big"))
            )
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def drain(self) -> None:
        """Wait until the other side has room. Raises ConnectionError where it is gone."""
        await self._writer.drain()

    def close(self) -> None:
        self._writer.close()
