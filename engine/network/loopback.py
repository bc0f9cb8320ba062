"""A socket such as an engine serves, with both of its ends in one process, to measure messages."""

from __future__ import annotations

import zmq

ARRIVAL_MS = 10_000
"""How long a message may take to arrive."""


class LoopbackSocket:
    """The engine's end and the only client's end of a socket at `address`."""

    def __init__(self, address: str) -> None:
        context: zmq.SyncContext = zmq.Context.instance()
        self._engine = context.socket(zmq.ROUTER)
        self._engine.bind(address)
        self._client = context.socket(zmq.DEALER)
        self._client.connect(address)
        self._poller = zmq.Poller()
        self._poller.register(self._engine, zmq.POLLIN)
        self._client.send(b"")
        self._name = self._engine.recv_multipart()[0]

    def send(self, message: bytes) -> None:
        """Send a message from the client, and wait until the engine's end has it."""
        self._client.send(message)
        assert self._poller.poll(ARRIVAL_MS), "a message in this process did not arrive"

    def read(self) -> list[bytes]:
        """Return the messages that have arrived, as an engine reads them before a step."""
        found = []
        while self._poller.poll(0):
            found.append(self._engine.recv_multipart(zmq.NOBLOCK)[1])
        return found

    def answer(self, message: bytes) -> None:
        """Send a message to the client, as an engine does."""
        self._engine.send_multipart([self._name, message])

    def close(self) -> None:
        """Close both ends, and drop what has not been read."""
        self._client.close(linger=0)
        self._engine.close(linger=0)
