"""The end of links between machines that listens: an engine's, or that of rank 0."""

from __future__ import annotations

import zmq
from zmq.auth.thread import ThreadAuthenticator

from .keys import Endpoint, KeyPair, set_heartbeats


class Guard:
    """Lets only those connect to a socket whose key was admitted, wherever it is bound from now on.

    The socket may have been bound elsewhere, without keys, before.
    """

    def __init__(self, socket: zmq.SyncSocket, keys: KeyPair) -> None:
        """`keys` are those of the socket."""
        self._admitted: set[bytes] = set()
        self._authenticator = ThreadAuthenticator(socket.context)
        self._authenticator.configure_curve_callback("*", self)
        self._authenticator.start()
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode())

    def admit(self, public_key: str) -> None:
        """Let in clients with this key from now on."""
        self._admitted.add(public_key.encode())

    def callback(self, domain: str, key: bytes) -> bool:
        """Say whether a client may connect. The authenticator's thread calls it."""
        return key in self._admitted

    def close(self) -> None:
        """Let nobody in any more."""
        self._authenticator.stop()


class NetworkDoor(Guard):
    """Lets clients of other machines connect to an engine's ROUTER, if their key was admitted. With
    it, sending to a client that has gone raises EHOSTUNREACH."""

    def __init__(self, socket: zmq.SyncSocket, address: str) -> None:
        """Listen on `address`, such as "tcp://10.0.0.5:*"."""
        keys = KeyPair.make()
        super().__init__(socket, keys)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        set_heartbeats(socket)
        socket.bind(address)
        bound = socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self.endpoint = Endpoint(bound.rstrip(b"\0").decode(), keys.public)
        """Where it listens, with the port that was free."""
