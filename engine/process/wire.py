"""Messages between the engine process and its clients: msgspec's msgpack, never pickle.

    client → engine   Hello · Add · Abort · ResetPrefixCache · Watch · WatchBlocks · ClientGone
                      · Admit · LoadAdapter · UnloadAdapter · AdaptersSeen
    engine → client   Ready | StartFailed, then Begun · StepMessage · Rejected · Heartbeat
                      · LiveView · BlocksKnown · PrefixCacheReset
                      · Adapters · AdapterChanged | AdapterRefused

The engine binds a ROUTER on a unix socket in a folder that only its user may enter, and each client
connects a DEALER. If it serves other machines, too (`Launch.listen`), it also listens on tcp, to
clients whose keys it was told to admit. Every client gets a StepMessage for every step, with the
outputs of its own requests. Only `Launch` takes another way: it is one line of JSON on the engine's
stdin. That pipe then stays open as the engine's lifeline, until the client that started the engine
closes it or dies.
"""

from __future__ import annotations

import msgspec

from ..config import EngineConfig, EngineInfo
from ..errors import InvalidRequestError, QuireError
from ..events.block_events import BlockChanges
from ..lora import AdapterSource
from ..network.keys import Endpoint
from ..outputs import EngineStats, LiveSnapshot, SequenceOutput
from ..request import Request
from .json_logs import LogFormat

HEARTBEAT_SECONDS = 0.4
"""Interval between two messages of an idle engine."""

PROTOCOL = 2
"""Version of these messages. An engine refuses a client of another version: it could not be sure
to go on with its streams."""

MAX_MESSAGE_BYTES = 256 * 2**20
"""Limit of one message: a peer that sends more is disconnected."""


class Launch(msgspec.Struct):
    """What the engine process needs to start.

    `address` is where it listens, and `listen` where it does so for other machines, such as
    "tcp://10.0.0.5:*"; None if it serves this one only. `core` is "module:function", which is
    called with the EngineConfig and returns the core to step; tests put a fake there.
    """

    config: EngineConfig
    address: str
    core: str
    log_level: str
    log_format: LogFormat
    listen: str | None = None


class Hello(msgspec.Struct, tag=True):
    """Registers the sender as a client. The answer is Ready or StartFailed.

    `protocol` is the sender's PROTOCOL; 1 stands for those that did not say it.
    """

    protocol: int = 1


class Add(msgspec.Struct, tag=True):
    """Submits a request. The answer is Rejected, or outputs in StepMessages.

    The request's times are seconds from the moment at which it is sent, so its arrival is negative:
    the clocks of two machines have nothing in common. `received` returns it by the receiver's.
    """

    request: Request

    @classmethod
    def sent(cls, request: Request, now: float) -> Add:
        """Make the message for a request whose times are by the sender's clock, which shows
        `now`."""
        return cls(request.shifted(-now))

    def received(self, now: float) -> Request:
        """Return the request with its times by the receiver's clock, which shows `now`."""
        return self.request.shifted(now)


class Abort(msgspec.Struct, tag=True):
    """Ends one choice of a request, or all of them if `choice` is None."""

    request_id: str
    choice: int | None


class ResetPrefixCache(msgspec.Struct, tag=True):
    """Drops all cached blocks that no sequence holds. The answer is PrefixCacheReset, in order."""


class Watch(msgspec.Struct, tag=True):
    """Asks for LiveViews for so many seconds from now on."""

    seconds: float


class WatchBlocks(msgspec.Struct, tag=True):
    """Asks for BlocksKnown now, and for changes of the known blocks from then on. A client that has
    missed some asks again."""


class ClientGone(msgspec.Struct, tag=True):
    """Reports that the client with this ZeroMQ identity has died.

    The engine aborts its requests and drops those of its messages that are still queued.
    """

    client: bytes


class Admit(msgspec.Struct, tag=True):
    """Lets clients with this public key (CURVE, in Z85) connect over tcp from now on."""

    public_key: str


class LoadAdapter(msgspec.Struct, tag=True):
    """Loads a LoRA adapter; with `replace`, in place of one of its name. The answer, AdapterChanged
    or AdapterRefused, has the same `number`, which the client chooses."""

    number: int
    source: AdapterSource
    replace: bool


class UnloadAdapter(msgspec.Struct, tag=True):
    """Unloads a LoRA adapter. It is answered as LoadAdapter is."""

    number: int
    name: str


class AdaptersSeen(msgspec.Struct, tag=True):
    """The client knows of the `change` that an Adapters message reported."""

    change: int


class Ready(msgspec.Struct, tag=True):
    """The engine has loaded and serves requests."""

    info: EngineInfo
    endpoint: Endpoint | None = None


class StartFailed(msgspec.Struct, tag=True):
    """The engine cannot start; it waits for its stdin to close, then exits."""

    code: str
    message: str


class Begun(msgspec.Struct, tag=True):
    """These requests of the client are in the step that now begins, and were not in the one before.

    It is sent before the step: should the step end the process, they are the suspects.
    """

    request_ids: list[str]


class StepMessage(msgspec.Struct, tag=True):
    """One step's outputs for the requests of the receiving client, and the engine's statistics.

    `num_added` is how many of the client's Adds the engine has read, refused ones included: those
    are in `stats`. `blocks` says what happened to the known blocks, if anything did and the client
    has asked for it.
    """

    outputs: list[SequenceOutput]
    stats: EngineStats
    num_added: int = 0
    blocks: BlockChanges | None = None


class Rejected(msgspec.Struct, tag=True):
    """The engine refused an `Add`; `code` identifies the error (see `error_from_code`)."""

    request_id: str
    code: str
    message: str
    param: str | None

    @classmethod
    def for_error(cls, request_id: str, error: QuireError) -> Rejected:
        """Report the error that refused the request."""
        return cls(request_id, error.code, error.message, getattr(error, "param", None))


class Heartbeat(msgspec.Struct, tag=True):
    """A sign of life from an engine that has no work.

    `num_open` counts the requests that it has not finished. An engine without work should have
    none: a request that it keeps open is one that it has lost. The other fields are as in
    StepMessage.
    """

    stats: EngineStats
    num_open: int
    num_added: int = 0
    blocks: BlockChanges | None = None


class BlocksKnown(msgspec.Struct, tag=True):
    """All full blocks that can be found by their content, as keys one after the other.

    It includes the effect of all BlockChanges up to number `sequence`.
    """

    sequence: int
    keys: bytes


class PrefixCacheReset(msgspec.Struct, tag=True):
    """The prefix cache has been reset, as the client asked."""


class LiveView(msgspec.Struct, tag=True):
    """The engine between two steps, for clients that watch it."""

    snapshot: LiveSnapshot


class Adapters(msgspec.Struct, tag=True):
    """The LoRA adapters that are loaded from now on. Every client gets it, and answers with
    AdaptersSeen."""

    change: int
    adapters: tuple[AdapterSource, ...]


class AdapterChanged(msgspec.Struct, tag=True):
    """A LoadAdapter or UnloadAdapter has been done, and all clients know of it."""

    number: int


class AdapterRefused(msgspec.Struct, tag=True):
    """A LoadAdapter or UnloadAdapter was refused; the fields are as in Rejected."""

    number: int
    code: str
    message: str
    param: str | None

    @classmethod
    def for_error(cls, number: int, error: QuireError) -> AdapterRefused:
        """Report the error that refused the change."""
        return cls(number, error.code, error.message, getattr(error, "param", None))


ToEngine = (
    Hello
    | Add
    | Abort
    | ResetPrefixCache
    | Watch
    | WatchBlocks
    | ClientGone
    | Admit
    | LoadAdapter
    | UnloadAdapter
    | AdaptersSeen
)
FromEngine = (
    Ready
    | StartFailed
    | Begun
    | StepMessage
    | Rejected
    | Heartbeat
    | BlocksKnown
    | PrefixCacheReset
    | LiveView
    | Adapters
    | AdapterChanged
    | AdapterRefused
)

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class MalformedMessageError(ValueError):
    """The bytes are not a message of this protocol."""


def encode(message: ToEngine | FromEngine) -> bytes:
    """Encode a message as one frame."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Decode a client's message. Raises MalformedMessageError."""
    try:
        return _to_engine.decode(data)
    except (msgspec.MsgspecError, InvalidRequestError, ValueError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from error


def decode_from_engine(data: bytes) -> FromEngine:
    """Decode the engine's message. Raises MalformedMessageError."""
    try:
        return _from_engine.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise MalformedMessageError(str(error)) from error
