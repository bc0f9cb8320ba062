"""One life of the engine process, seen from its client: start, talk, stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from . import wire

STOP_GRACE_SECONDS = 2.0
STACK_DUMP_SECONDS = 0.5


def engine_environment(parent: Mapping[str, str], num_threads: int | None) -> dict[str, str]:
    """The environment of the engine: its parent's, and how OpenMP's threads wait where that does
    not say. Read by the runtime when torch is imported, so it cannot be set later."""
    environment = dict(parent)
    # Threads that spin for long between parallel regions starve the HTTP process; those that sleep
    # at once take 50 to 150 us to wake in each region.
    if environment.setdefault("OMP_WAIT_POLICY", "passive").lower() == "passive":
        environment.setdefault("GOMP_SPINCOUNT", "10000")  # some 100 us; GNU's OpenMP
    # What a step has freed is kept for the next one: the system would have to clear it again.
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(64 << 20))
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment


class EngineLink:
    """The socket to an engine that listens at `address`, or will; says hello at once.

    `name` is its ZeroMQ identity; without one the engine makes one up.
    """

    def __init__(self, address: str, name: bytes | None = None) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        if name is not None:
            self._socket.set(zmq.IDENTITY, name)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.LINGER, 0)
        self._socket.connect(address)
        self.send(wire.Hello())

    def send(self, message: wire.ToEngine) -> None:
        """Never blocks: the socket has no high-water mark."""
        self._socket.send(wire.encode(message))

    async def receive(self) -> wire.FromEngine:
        return wire.decode_from_engine(await self._socket.recv())

    def close(self) -> None:
        self._socket.close()


class EngineHandle(EngineLink):
    """A started process and the socket to it; made by `launch`, ended by `stop`."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        super().__init__(address)
        self.address = address
        self._process = process

    @classmethod
    async def launch(cls, launch: wire.Launch) -> EngineHandle:
        """Start the process and say hello; it answers Ready or StartFailed, or exits."""
        environment = engine_environment(os.environ, launch.config.num_threads)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "quire.engine.process.engine_process"),
            stdin=asyncio.subprocess.PIPE,
            env=environment,
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(launch) + b"\n")
        return cls(process, launch.address)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._process.returncode

    async def wait(self) -> None:
        """Until the process has ended."""
        await self._process.wait()

    def hide_socket(self) -> None:
        """Remove its name and its folder, once the one connection there is stands: no stranger
        finds it then, and nothing is left behind where this process is killed."""
        path = Path(self.address.removeprefix("ipc://"))
        with contextlib.suppress(FileNotFoundError):  # someone tidied up before
            path.unlink()
            path.parent.rmdir()

    def ask_to_end(self) -> None:
        """Close its stdin: it ends after the step that it is in."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    async def dump_and_kill(self) -> None:
        """Have it write its stacks to stderr, then end it at once."""
        with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
            self._process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(STACK_DUMP_SECONDS)
            self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        """End it, politely at first, and close the socket."""
        self.ask_to_end()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_GRACE_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self.close()
