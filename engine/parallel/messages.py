"""Messages between rank 0 and the followers: msgspec's msgpack over ZeroMQ, never pickles.

    follower → rank 0   Join, then Vote | Failed
    rank 0 → follower   Welcome | Refused, then Verdict · Step · AdapterLayer · DropAdapter ·
                        HostMemory · Stop

Rank 0 binds a ROUTER, and every follower connects a DEALER whose identity is its rank. A plan has
no answer: plans arrive in order, and what holds a rank that is ahead are the collectives.
"""

from __future__ import annotations

import msgspec
import zmq

from ..config import EngineConfig
from .step_plan import StepPlan

PROTOCOL = 3
"""Version of these messages and of the order of collectives. All ranks must have the same."""
HEARTBEAT_MS = 1000
SILENCE_MS = 10_000
"""A peer that is silent for so long, because its process is stopped or its host is gone, counts as
dead."""
MAX_MESSAGE_BYTES = 256 * 2**20
FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
"""Events of a connection that rank 0 does not accept, as a follower sees it."""


class Join(msgspec.Struct, array_like=True, tag=True):
    """A follower is there, with this configuration."""

    rank: int
    protocol: int
    config: EngineConfig


class Vote(msgspec.Struct, array_like=True, tag=True):
    """What a rank says to one question of `Ranks.agree`."""

    values: list[int]


class Failed(msgspec.Struct, array_like=True, tag=True):
    """A follower cannot start; `code` identifies the error."""

    code: str
    message: str


class Welcome(msgspec.Struct, array_like=True, tag=True):
    """All ranks are there and have loaded. They meet in the torch.distributed store at this
    address."""

    host: str
    port: int


class Verdict(msgspec.Struct, array_like=True, tag=True):
    """What all ranks said, by rank."""

    votes: list[list[int]]


class Refused(msgspec.Struct, array_like=True, tag=True):
    """A follower may not join, for this reason."""

    message: str


class Step(msgspec.Struct, array_like=True, tag=True):
    """The next step."""

    plan: StepPlan


class AdapterLayer(msgspec.Struct, array_like=True, tag=True):
    """A layer's whole weights of the LoRA adapter of this id, as `adapter_cuts.pack_weight` makes
    them. All layers of an adapter precede the first step that names it."""

    adapter_id: int
    name: str
    rank: int
    a: bytes
    b: bytes


class DropAdapter(msgspec.Struct, array_like=True, tag=True):
    """No later step names this adapter."""

    adapter_id: int


class HostMemory(msgspec.Struct, array_like=True, tag=True):
    """Take host memory for so many blocks of this rank's cache. The follower votes with the
    nanoseconds of a block's copy."""

    num_slots: int


class Stop(msgspec.Struct, array_like=True, tag=True):
    """The follower ends."""


ToLeader = Join | Vote | Failed
Order = Step | AdapterLayer | DropAdapter | HostMemory
"""What a follower does once it has started."""
ToFollower = Welcome | Verdict | Refused | Order | Stop

_encoder = msgspec.msgpack.Encoder()
_to_leader: msgspec.msgpack.Decoder[ToLeader] = msgspec.msgpack.Decoder(ToLeader)
_to_follower: msgspec.msgpack.Decoder[ToFollower] = msgspec.msgpack.Decoder(ToFollower)


def encode(message: ToLeader | ToFollower) -> bytes:
    """Encode a message as one frame."""
    return _encoder.encode(message)


def decode_to_leader(data: bytes) -> ToLeader:
    """Decode a follower's message. Raises msgspec.MsgspecError."""
    return _to_leader.decode(data)


def decode_to_follower(data: bytes) -> ToFollower:
    """Decode rank 0's message. Raises msgspec.MsgspecError."""
    return _to_follower.decode(data)


def make_socket(kind: int) -> zmq.SyncSocket:
    """Make a socket that never drops a message and finds out when its peer has gone silent."""
    context: zmq.SyncContext = zmq.Context.instance()
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, SILENCE_MS)
    socket.setsockopt(zmq.LINGER, 1000)
    return socket
