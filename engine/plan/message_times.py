"""Measures what an engine's process does between two steps: it reads the requests that have come,
and sends what the step has made. Both go over a real socket, with the wire's messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from ..core.engine_core import EngineCore
from ..network.loopback import LoopbackSocket
from ..process import wire
from ..process.private_folder import private_folder
from ..request import Request
from .planned_engine import MessageTimes


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
        socket = LoopbackSocket(f"ipc://{folder / 'engine'}")
        try:
            for request in requests:
                socket.send(wire.encode(wire.Add.sent(request, time.monotonic())))
                # 1. A request is read and added. The steps between have displaced this code from
                #    the processor's caches, as they do in a server.
                begin = clock()
                for data in socket.read():
                    message = wire.decode_to_engine(data)
                    assert isinstance(message, wire.Add)
                    core.add_request(message.received(time.monotonic()))
                reading.append(clock() - begin)
                # 2. Steps are answered, and the socket is looked at before the next one.
                while core.has_work:
                    step = core.step()
                    begin = clock()
                    answer = wire.StepMessage(step.outputs, step.stats, 0, None)
                    socket.answer(wire.encode(answer))
                    socket.read()
                    between.append(clock() - begin)
        finally:
            socket.close()
    return MessageTimes(step=median(between), request=median(reading))
