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
    # at once take 50 to 150 us to wake, in each of a step's hundred regions.
    if environment.setdefault("OMP_WAIT_POLICY", "passive").lower() == "passive":
        environment.setdefault("GOMP_SPINCOUNT", "1000")  # some microseconds; GNU's OpenMP
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment


class EngineHandle:
    """A started process and the socket to it; made by `launch`, ended by `stop`."""

    def __init__(
        self, process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket, socket_path: Path
    ) -> None:
        self._process = process
        self._socket = socket
        self._socket_path = socket_path

    @classmethod
    async def launch(cls, launch: wire.Launch) -> EngineHandle:
        """Start the process and say hello; it answers Ready or StartFailed, or exits."""
        environment = engine_environment(os.environ, launch.config.num_threads)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "quire.engine.engine_process"),
            stdin=asyncio.subprocess.PIPE,
            env=environment,
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(launch) + b"\n")
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.set(zmq.LINGER, 0)
        socket.connect(launch.address)
        handle = cls(process, socket, Path(launch.address.removeprefix("ipc://")))
        handle.send(wire.Hello())
        return handle

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

    def send(self, message: wire.ToEngine) -> None:
        """Never blocks: the socket has no high-water mark."""
        self._socket.send(wire.encode(message))

    async def receive(self) -> wire.FromEngine:
        return wire.decode_from_engine(await self._socket.recv())

    def hide_socket(self) -> None:
        """Remove its name and its folder, once the one connection there is stands: no stranger
        finds it then, and nothing is left behind where this process is killed."""
        with contextlib.suppress(FileNotFoundError):  # someone tidied up before
            self._socket_path.unlink()
            self._socket_path.parent.rmdir()

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
        self._socket.close()
