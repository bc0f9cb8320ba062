"""A socket such as an engine serves, with both of its ends in one process, to measure messages."""

from __future__ import annotations

import time

import zmq

from ..request import Request
from . import wire

ARRIVAL_MS = 10_000
"""How long a message may take to arrive."""


class EngineSocket:
    """Both ends of a socket such as an engine serves, in one process."""

    def __init__(self, address: str) -> None:
        context: zmq.SyncContext = zmq.Context.instance()
        self._engine = context.socket(zmq.ROUTER)
        self._engine.bind(address)
        self._client = context.socket(zmq.DEALER)
        self._client.connect(address)
        self._poller = zmq.Poller()
        self._poller.register(self._engine, zmq.POLLIN)
        self._client.send(wire.encode(wire.Hello(wire.PROTOCOL)))
        self._name = self._engine.recv_multipart()[0]

    def add(self, request: Request) -> None:
        """Send a request, as a client does."""
        self._client.send(wire.encode(wire.Add.sent(request, time.monotonic())))

    def wait(self) -> None:
        """Wait until a request has arrived."""
        assert self._poller.poll(ARRIVAL_MS), "a message in this process did not arrive"

    def read(self) -> list[Request]:
        """Return the requests that have arrived, as an engine reads them before a step."""
        found = []
        while self._poller.poll(0):
            message = wire.decode_to_engine(self._engine.recv_multipart(zmq.NOBLOCK)[1])
            assert isinstance(message, wire.Add)
            found.append(message.received(time.monotonic()))
        return found

    def answer(self, message: wire.StepMessage) -> None:
        """Send what a step has made, as an engine does."""
        self._engine.send_multipart([self._name, wire.encode(message)])

    def close(self) -> None:
        """Close both ends, and drop what has not been read."""
        self._client.close(linger=0)
        self._engine.close(linger=0)
