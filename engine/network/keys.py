"""Keys and addresses of links between machines, and the options that both ends set."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import zmq
from zmq.utils.z85 import encode

from ..errors import ConfigurationError, one_line

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1_000, 5_000
"""Interval of ZeroMQ's own heartbeats, and the silence after which a link is given up. They are
sent by a thread of their own, so a long step delays none."""

MIN_SECRET_BYTES = 32
"""Minimum length of a secret of which keys are made."""


class Endpoint(NamedTuple):
    """Where an engine listens for clients of other machines, and the public key (CURVE, in Z85) by
    which they know that it is the engine. Both are new at each of its starts."""

    address: str
    public_key: str


class KeyPair(NamedTuple):
    """A pair of keys (CURVE, in Z85)."""

    public: str
    secret: str

    @classmethod
    def make(cls) -> KeyPair:
        """Return a new pair."""
        return cls(*(key.decode() for key in zmq.curve_keypair()))


def shared_keys(path: str) -> KeyPair:
    """Return the pair of keys that every host makes of the secret in a file: who has the secret has
    both, and nobody else has either. Raises ConfigurationError if the file cannot be read, or if
    its secret is short."""
    try:
        secret = Path(path).expanduser().read_bytes().strip()
    except OSError as error:
        raise ConfigurationError(
            f"--node-key-file {path}: {error.strerror or one_line(error)}"
        ) from error
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigurationError(
            f"--node-key-file {path}: a secret has at least {MIN_SECRET_BYTES} characters, not "
            f"{len(secret)}"
        )
    key = encode(sha256(b"quire node key\0" + secret).digest())
    return KeyPair(zmq.curve_public(key).decode(), key.decode())


def require_loopback(address: str) -> None:
    """Raise ConfigurationError if an address without keys can be reached from other machines."""
    host = address.removeprefix("tcp://").rpartition(":")[0]
    if address.startswith("tcp://") and not host.startswith(("127.", "[::1]")):
        raise ConfigurationError(f"{address} can be reached from other machines: it needs keys")


def set_heartbeats(socket: zmq.Socket[Any]) -> None:
    """Let a socket notice that its peer's machine is gone. Call it before bind or connect."""
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
