"""The engine process as its client sees it, from one start to its end: launch, talk, stop."""

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

from ..network.keys import require_loopback
from . import wire

STOP_GRACE_SECONDS = 2.0
"""Time that `stop` gives the process to end by itself before it is killed."""
STACK_DUMP_SECONDS = 0.5
"""Time that a hung process gets to write its stacks before it is killed."""


def engine_environment(parent: Mapping[str, str], num_threads: int | None) -> dict[str, str]:
    """Return the engine's environment: its parent's, with defaults for OpenMP and malloc.

    OpenMP's runtime and malloc read their settings when they are loaded, so the engine cannot set
    them itself later. Variables that the parent sets keep their values, except that `num_threads`
    overrides OMP_NUM_THREADS.
    """
    environment = dict(parent)
    # Threads that spin for long between parallel regions starve the HTTP process; threads that
    # sleep at once take 50 to 150 µs to wake for each region. So they spin briefly.
    if environment.setdefault("OMP_WAIT_POLICY", "passive").lower() == "passive":
        environment.setdefault("GOMP_SPINCOUNT", "10000")  # about 100 µs with GNU's OpenMP
    # malloc keeps what a step frees for the next step. Pages that it gave back to the system would
    # have to be faulted in and cleared again.
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(64 << 20))
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment


class EngineLink:
    """A client's socket to the engine at `address`, which need not listen yet.

    It sends Hello on creation. `name` is the socket's ZeroMQ identity; if it is None, the engine's
    socket makes one up. Raises ConfigurationError if the address is one of a network.
    """

    has_keys = False
    """Whether it may leave this machine."""

    def __init__(self, address: str, name: bytes | None = None) -> None:
        if not self.has_keys:
            require_loopback(address)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        if name is not None:
            self._socket.set(zmq.IDENTITY, name)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.LINGER, 0)
        self._configure()
        self._socket.connect(address)
        self.send(wire.Hello(wire.PROTOCOL))

    def _configure(self) -> None:
        """Set more options of the socket before it connects."""

    def send(self, message: wire.ToEngine) -> None:
        """Send without ever blocking: the socket has no high-water mark."""
        self._socket.send(wire.encode(message))

    async def receive(self) -> wire.FromEngine:
        """Wait for the engine's next message."""
        return wire.decode_from_engine(await self._socket.recv())

    def close(self) -> None:
        """Close the socket and drop what has not been sent."""
        self._socket.close()


class EngineHandle(EngineLink):
    """A started engine process and the socket to it. `launch` makes it and `stop` ends it."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        super().__init__(address)
        self.address = address
        self._process = process

    @classmethod
    async def launch(
        cls, launch: wire.Launch, variables: Mapping[str, str] | None = None
    ) -> EngineHandle:
        """Start the process, with these variables in its environment, and send Hello. The process
        answers Ready or StartFailed, or exits.

        Raises OSError if there are not enough processes, descriptors or bytes for it.
        """
        environment = engine_environment(os.environ, launch.config.num_threads)
        environment |= variables or {}
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "quire.engine.process.engine_process"),
                stdin=asyncio.subprocess.PIPE,
                env=environment,
            )
        )
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:  # otherwise a process that nobody knows would stay
            process = await starting
            process.kill()
            await process.wait()
            raise
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(launch) + b"\n")
        try:
            return cls(process, launch.address)
        except zmq.ZMQError as error:
            process.kill()
            await process.wait()
            raise OSError(error.errno, error.strerror) from error

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code of the process: None while it runs, −n if signal n ended it."""
        return self._process.returncode

    async def wait(self) -> None:
        """Wait for the process to end."""
        await self._process.wait()

    def hide_socket(self) -> None:
        """Remove the engine's socket file and its folder.

        Call it when the only client has connected. After that no stranger can find the socket, and
        nothing is left behind if this process is killed.
        """
        path = Path(self.address.removeprefix("ipc://"))
        with contextlib.suppress(FileNotFoundError):  # it has been removed already
            path.unlink()
            path.parent.rmdir()

    def ask_to_end(self) -> None:
        """Close the engine's stdin, so that it ends after its current step."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    async def dump_and_kill(self) -> None:
        """Make the process write its threads' stacks to stderr, then kill it."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            self._process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(STACK_DUMP_SECONDS)
            self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        """End the process, by force if it does not end when asked, and close the socket."""
        self.ask_to_end()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_GRACE_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self.close()
