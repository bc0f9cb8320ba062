"""The engine's end of links between machines."""

from __future__ import annotations

import zmq
from zmq.auth.thread import ThreadAuthenticator

from .keys import Endpoint, KeyPair, set_heartbeats


class NetworkDoor:
    """Lets clients of other machines connect to an engine's ROUTER, if their key was admitted.

    The socket may have been bound elsewhere, without keys, before. With a door, sending to a client
    that has gone raises EHOSTUNREACH.
    """

    def __init__(self, socket: zmq.SyncSocket, address: str) -> None:
        """Listen on `address`, such as "tcp://10.0.0.5:*"."""
        self._admitted: set[bytes] = set()
        self._authenticator = ThreadAuthenticator(socket.context)
        self._authenticator.configure_curve_callback("*", self)
        self._authenticator.start()
        keys = KeyPair.make()
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
        socket.set(zmq.ROUTER_MANDATORY, 1)
        set_heartbeats(socket)
        socket.bind(address)
        bound = socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self.endpoint = Endpoint(bound.rstrip(b"\0").decode(), keys.public)
        """Where it listens, with the port that was free."""

    def admit(self, public_key: str) -> None:
        """Let in clients with this key from now on."""
        self._admitted.add(public_key.encode())

    def callback(self, domain: str, key: bytes) -> bool:
        """Say whether a client may connect. The authenticator's thread calls it."""
        return key in self._admitted
