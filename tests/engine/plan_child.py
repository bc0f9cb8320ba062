"""A worker in a process of its own that knows only what plans and constraints tell it.

    python -P plan_child.py

Reads frames from stdin, each 4 bytes of length and a message in msgpack: first the EngineConfig,
then in turns the plan of a step and the constraints of its sampling. Answers each pair with the
step's ModelRunnerOutput.
"""

from __future__ import annotations

import sys
from typing import Any, BinaryIO

import msgspec

from quire.engine.config import EngineConfig
from quire.engine.runner.worker import Worker
from quire.engine.step import SamplingConstraints, SchedulerOutput


def write_frame(stream: BinaryIO, message: Any) -> None:
    body = msgspec.msgpack.encode(message)
    stream.write(len(body).to_bytes(4, "little") + body)
    stream.flush()


def read_frame(stream: BinaryIO, kind: Any) -> Any:
    """Return the next message, or None at the end of the stream."""
    length = stream.read(4)
    if not length:
        return None
    return msgspec.msgpack.decode(stream.read(int.from_bytes(length, "little")), type=kind)


def main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    worker = Worker(read_frame(requests, EngineConfig))
    worker.load()
    worker.profile()
    while (plan := read_frame(requests, SchedulerOutput)) is not None:
        forward = worker.forward(plan)
        results = forward.sample(read_frame(requests, SamplingConstraints))
        write_frame(answers, results())


if __name__ == "__main__":
    main()
