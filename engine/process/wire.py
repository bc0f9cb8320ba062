"""Messages between the engine process and its clients: msgspec's msgpack, never pickle.

    client → engine   Hello · Add · Abort · ResetPrefixCache · ClientGone
    engine → client   Ready | StartFailed, then Step · Rejected · Heartbeat · PrefixCacheReset

The engine binds a ROUTER on a unix socket in a folder that only its user may enter; each client
connects a DEALER. All clients are told of every step, each with the outputs of its own requests.
`Launch` alone goes another way: as a line of JSON on the engine's stdin, which then stays open for
as long as the client lives that started the engine.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ..config import EngineConfig, EngineInfo
from ..errors import InvalidRequestError
from ..outputs import EngineStats, SequenceOutput
from ..request import Request

HEARTBEAT_SECONDS = 0.4
"""An idle engine is heard this often."""

MAX_MESSAGE_BYTES = 256 * 2**20
"""A peer that sends more is disconnected."""

LogFormat = Literal["console", "json"]


class Launch(msgspec.Struct):
    """`core` is "module:function", called with the EngineConfig; tests put a fake there."""

    config: EngineConfig
    address: str
    core: str
    log_level: str
    log_format: LogFormat


class Hello(msgspec.Struct, tag=True):
    """The sender is a client from now on; answered by Ready or StartFailed."""


class Add(msgspec.Struct, tag=True):
    request: Request


class Abort(msgspec.Struct, tag=True):
    request_id: str
    choice: int | None


class ResetPrefixCache(msgspec.Struct, tag=True):
    """Answered by PrefixCacheReset, in order."""


class ClientGone(msgspec.Struct, tag=True):
    """The client of this ZeroMQ identity has died: its requests are aborted, and what is still
    read of it is dropped."""

    client: bytes


class Ready(msgspec.Struct, tag=True):
    info: EngineInfo


class StartFailed(msgspec.Struct, tag=True):
    """The engine waits for its stdin to close, then exits."""

    code: str
    message: str


class Step(msgspec.Struct, tag=True):
    outputs: list[SequenceOutput]
    stats: EngineStats


class Rejected(msgspec.Struct, tag=True):
    """`Add` was refused with the error of this code."""

    request_id: str
    code: str
    message: str
    param: str | None


class Heartbeat(msgspec.Struct, tag=True):
    """Idle and well, unless `num_open` requests that should be running are not."""

    stats: EngineStats
    num_open: int


class PrefixCacheReset(msgspec.Struct, tag=True):
    pass


ToEngine = Hello | Add | Abort | ResetPrefixCache | ClientGone
FromEngine = Ready | StartFailed | Step | Rejected | Heartbeat | PrefixCacheReset

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class MalformedMessageError(ValueError):
    """Bytes that are none of ours."""


def encode(message: ToEngine | FromEngine) -> bytes:
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Raises MalformedMessageError."""
    try:
        return _to_engine.decode(data)
    except (msgspec.MsgspecError, InvalidRequestError, ValueError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from error


def decode_from_engine(data: bytes) -> FromEngine:
    """Raises MalformedMessageError."""
    try:
        return _from_engine.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise MalformedMessageError(str(error)) from error
