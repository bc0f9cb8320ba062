"""Measures what an engine's process does between two steps: it reads the requests that have come,
and sends what the step has made. Both go over a real socket, with the wire's messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import zmq

from ..core.engine_core import EngineCore
from ..process import wire
from ..process.private_folder import private_folder
from ..request import Request
from .planned_engine import MessageTimes

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


def measure_messages(
    core: EngineCore,
    requests: list[Request],
    clock: Callable[[], float] = time.perf_counter,
) -> MessageTimes:
    """Send the requests to an engine one after the other, run each to its end, and time what is not
    a step. The medians count. The requests should have several tokens of output."""
    reading: list[float] = []
    between: list[float] = []
    with private_folder() as folder:
        socket = EngineSocket(f"ipc://{folder / 'engine'}")
        try:
            for request in requests:
                socket.add(request)
                socket.wait()
                # 1. A request is read and added. The steps between have displaced this code from
                #    the processor's caches, as they do in a server.
                begin = clock()
                for one in socket.read():
                    core.add_request(one)
                reading.append(clock() - begin)
                # 2. Steps are answered, and the socket is looked at before the next one.
                while core.has_work:
                    step = core.step()
                    begin = clock()
                    socket.answer(wire.StepMessage(step.outputs, step.stats, 0, None))
                    socket.read()
                    between.append(clock() - begin)
        finally:
            socket.close()
    return MessageTimes(step=median(between), request=median(reading))
