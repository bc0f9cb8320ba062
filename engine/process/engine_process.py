"""The engine's own process: it steps one core and serves it to the clients over ZeroMQ.

A client starts it as `python -P -m quire.engine.process.engine_process`. (Without -P the current
folder would be on sys.path, and in the repository's root transformers would take the folder
`kernels` for the package of that name.)

The process lives as long as its stdin is open: the client that started it closes the pipe to stop
the engine, and the kernel closes it if that client dies. A step that hangs would never see that, so
the kernel is also asked to kill the process with its parent (`die_with_parent`). SIGUSR1 dumps
every thread's stack to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
import zmq

from ..config import EngineConfig, EngineInfo
from ..errors import QuireError, StartupError
from ..events.block_events import BlockEvent
from ..events.block_feed import BlockFeed
from ..events.kv_publisher import KVPublisher, make_publisher
from ..network.door import NetworkDoor
from ..network.keys import require_loopback
from ..outputs import EngineStats, LiveSnapshot, SequenceOutput, StepOutput
from ..request import Request
from . import wire
from .adapter_changes import POLL_MS, AdapterChanges, AdaptersProtocol
from .heap import settle
from .json_logs import prepare_process, take_over_libraries
from .live_views import LiveViews

PR_SET_PDEATHSIG = 1
"""The prctl(2) option that sets the signal a process gets when its parent dies."""

LAST_MESSAGES_SECONDS = 0.2
"""How long an engine that fails goes on, so that ZeroMQ's thread sends what waits to be sent."""

logger = logging.getLogger("quire.engine")


class EngineCoreProtocol(Protocol):
    """What the process steps: `engine.core.engine_core.EngineCore`, or a fake of it."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def has_work(self) -> bool: ...

    def watch_begins(self, on_begin: Callable[[list[str]], None]) -> None: ...

    def add_request(self, request: Request) -> None: ...

    def abort_request(self, request_id: str, choice: int | None = None) -> None: ...

    def step(self) -> StepOutput: ...

    def reset_prefix_cache(self) -> None: ...

    def close(self) -> None: ...

    def record_blocks(self, on: bool) -> None: ...

    def take_block_events(self) -> list[BlockEvent]: ...

    def known_blocks(self) -> list[bytes]: ...

    def stats(self) -> EngineStats: ...

    @property
    def adapters(self) -> AdaptersProtocol: ...
    def snapshot(self) -> LiveSnapshot: ...

    def end_snapshots(self) -> None: ...


def build_core(config: EngineConfig) -> EngineCoreProtocol:
    """Build the real engine: load weights, profile memory, warm up. Raises StartupError."""
    # These imports create a million objects that stay. Collections during the imports would walk
    # them again and again, which takes a tenth of the imports' time; walking them once while the
    # weights are loaded would take half a second.
    gc.disable()
    from ..devices.choose import before_imports

    before_imports(config)
    from ..core.engine_core import EngineCore
    from ..runner.worker import Worker

    gc.freeze()
    gc.enable()
    take_over_libraries()
    return EngineCore(config, Worker(config))


class _OpenRequest(NamedTuple):
    """A request that has not ended: who sent it, and which of its choices have not ended."""

    client: bytes
    open_choices: set[int]


class EngineServer:
    """Steps one core on behalf of its clients. `socket` is a bound ROUTER; `publisher` gets what
    happens to the core's blocks, and `door` lets in clients of other machines."""

    def __init__(
        self,
        socket: zmq.SyncSocket,
        publisher: KVPublisher | None = None,
        door: NetworkDoor | None = None,
    ) -> None:
        self._socket = socket
        self._door = door
        self._unreachable: set[bytes] = set()
        """Clients of other machines that a message did not reach."""
        self._clients: list[bytes] = []
        self._added: Counter[bytes] = Counter()
        """How many Adds each client has sent."""
        self._gone: set[bytes] = set()
        """Clients that have died; messages from them may still be queued."""
        self._open: dict[str, _OpenRequest] = {}
        self._core: EngineCoreProtocol
        self._failure: wire.StartFailed | None = None
        self._adapters = AdapterChanges(
            lambda client, message: self._send(client, wire.encode(message))
        )
        self._live = LiveViews(self._send)
        self._blocks = BlockFeed(self._send_known_blocks, publisher)
        self._stdin = sys.stdin.fileno()
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._stdin, zmq.POLLIN)

    def run(self, core: EngineCoreProtocol) -> None:
        """Serve until stdin closes. An exception from the core propagates and ends the process."""
        self._core = core
        core.watch_begins(self._tell_begun)
        self._blocks.begin(core)
        heartbeat_ms = int(wire.HEARTBEAT_SECONDS * 1000)
        changes = self._adapters
        while self._poll(0 if core.has_work else POLL_MS if changes.is_reading else heartbeat_ms):
            for client, message in self._receive_all():
                if client not in self._gone:  # it may have died with a message before this one
                    self._handle(core, client, message)
            while self._unreachable:
                self._forget(core, self._unreachable.pop())
            if changes.is_reading:
                changes.finish_read(core.adapters, self._clients)
            if core.has_work:
                self._send_step(core.step())
            else:
                self._send_heartbeat(core)
            if self._live.watched:
                self._live.send_if_due(core)

    def report_failure(self, error: StartupError) -> None:
        """Answer every Hello with the reason why the start failed, until stdin closes."""
        self._failure = wire.StartFailed(error.code, error.message)
        while self._poll(None):
            self._receive_all()

    def _poll(self, timeout_ms: int | None) -> bool:
        """Wait at most `timeout_ms` for a message; return False once stdin is closed."""
        ready = dict(self._poller.poll(timeout_ms))
        # After the Launch line nothing is ever written to stdin, so readable means closed.
        return self._stdin not in ready

    def _receive_all(self) -> list[tuple[bytes, wire.ToEngine]]:
        """Take all messages that have arrived, in order. Malformed ones are logged and dropped."""
        messages: list[tuple[bytes, wire.ToEngine]] = []
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            sender, *rest = frames
            try:
                if len(rest) != 1:
                    raise wire.MalformedMessageError(f"{len(rest)} frames instead of 1")
                message = wire.decode_to_engine(rest[0])
            except wire.MalformedMessageError as error:
                logger.warning("dropped a malformed message: %s", error)
                continue
            if isinstance(message, wire.Hello):
                self._greet(sender, message.protocol)
            elif sender not in self._clients:
                logger.warning("dropped a message from a peer that had not said hello")
            else:
                messages.append((sender, message))

    def _greet(self, client: bytes, protocol: int) -> None:
        """Register the client and answer its Hello, unless it is known or has died."""
        if client in self._gone or client in self._clients:
            return
        if protocol != wire.PROTOCOL:
            message = f"the engine speaks version {wire.PROTOCOL} of its protocol, not {protocol}"
            logger.warning("refused a client: %s", message)
            self._send(client, wire.encode(wire.StartFailed(StartupError.code, message)))
            return
        self._clients.append(client)
        endpoint = None if self._door is None else self._door.endpoint
        greeting = self._failure or wire.Ready(self._core.info, endpoint)
        self._send(client, wire.encode(greeting))

    def _handle(self, core: EngineCoreProtocol, client: bytes, message: wire.ToEngine) -> None:
        match message:
            case wire.Add():
                self._added[client] += 1
                request = message.received(time.monotonic())
                try:
                    core.add_request(request)
                except QuireError as error:
                    rejected = wire.Rejected.for_error(request.request_id, error)
                    self._send(client, wire.encode(rejected))
                else:
                    choices = set(request.open_choices)
                    self._open[request.request_id] = _OpenRequest(client, choices)
            case wire.Abort(request_id, choice):
                core.abort_request(request_id, choice)
            case wire.ResetPrefixCache():
                core.reset_prefix_cache()
                self._send(client, wire.encode(wire.PrefixCacheReset()))
            case wire.LoadAdapter() | wire.UnloadAdapter():
                self._adapters.ask(core.adapters, client, message, self._clients)
            case wire.AdaptersSeen(change):
                self._adapters.seen(client, change)
            case wire.Watch(seconds):
                self._live.watch(client, seconds)
            case wire.WatchBlocks():
                self._blocks.watch(core, client)
            case wire.ClientGone(dead):
                self._forget(core, dead)
            case wire.Admit(public_key):
                if self._door is not None:
                    self._door.admit(public_key)

    def _forget(self, core: EngineCoreProtocol, client: bytes) -> None:
        """Abort the requests of a client that has died."""
        self._gone.add(client)
        if client in self._clients:
            self._clients.remove(client)
        self._adapters.forget(client)
        del self._added[client]
        self._live.forget(client)
        self._blocks.forget(core, client)
        for request_id in [key for key, entry in self._open.items() if entry.client == client]:
            del self._open[request_id]
            core.abort_request(request_id)

    def _tell_begun(self, request_ids: list[str]) -> None:
        """Tell clients which of their requests the next step begins."""
        begun: dict[bytes, list[str]] = {}
        for request_id in dict.fromkeys(request_ids):
            if request_id in self._open:  # otherwise its client has died
                begun.setdefault(self._open[request_id].client, []).append(request_id)
        for client, ids in begun.items():
            self._send(client, wire.encode(wire.Begun(ids)))

    def _send_step(self, step: StepOutput) -> None:
        """Send each client the outputs of its own requests, in one message."""
        if len(self._clients) > 1 or self._gone:
            shares: dict[bytes, list[SequenceOutput]] = {client: [] for client in self._clients}
            for output in step.outputs:
                request = self._open.get(output.request_id)
                if request is not None:  # otherwise its client has died
                    shares[request.client].append(output)
        else:
            shares = dict.fromkeys(self._clients, step.outputs)
        blocks = self._blocks.take(self._core)
        for client, outputs in shares.items():
            changes = blocks if client in self._blocks.watchers else None
            message = wire.StepMessage(outputs, step.stats, self._added[client], changes)
            self._send(client, wire.encode(message))
        for output in step.outputs:
            if output.finish_reason is not None and output.request_id in self._open:
                choices = self._open[output.request_id].open_choices
                choices.discard(output.choice)
                if not choices:
                    del self._open[output.request_id]

    def _send_heartbeat(self, core: EngineCoreProtocol) -> None:
        stats, blocks = core.stats(), self._blocks.take(core)
        for client in self._clients:
            changes = blocks if client in self._blocks.watchers else None
            heartbeat = wire.Heartbeat(stats, len(self._open), self._added[client], changes)
            self._send(client, wire.encode(heartbeat))

    def _send_known_blocks(self, client: bytes, sequence: int, keys: bytes) -> None:
        self._send(client, wire.encode(wire.BlocksKnown(sequence, keys)))

    def _send(self, client: bytes, message: bytes) -> None:
        try:
            self._socket.send_multipart([client, message])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._unreachable.add(client)


def _bind(address: str) -> zmq.SyncSocket:
    require_loopback(address)
    context: zmq.SyncContext = zmq.Context.instance()
    socket = context.socket(zmq.ROUTER)
    # No high-water mark: beyond one, a ROUTER drops messages.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(address)
    return socket


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, even in the middle of a hung step.

    The signal is sent when the parent's thread that started this process ends, so that thread has
    to be a long-lived one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _load_core_factory(path: str) -> Callable[[EngineConfig], EngineCoreProtocol]:
    """Import the function that `path` names as "module:function"."""
    module, _, function = path.partition(":")
    factory: Callable[[EngineConfig], EngineCoreProtocol]
    factory = getattr(importlib.import_module(module), function)
    return factory


def main() -> int:
    """Run the engine. Return 0 if it was asked to stop, 1 after a crash or a failed start."""
    die_with_parent()
    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    launch = msgspec.json.decode(line, type=wire.Launch)
    quiet = prepare_process(launch.log_level, launch.log_format, "engine")
    socket = _bind(launch.address)
    door = None if launch.listen is None else NetworkDoor(socket, launch.listen)
    try:
        publisher = make_publisher(launch.config)
        core = _load_core_factory(launch.core)(launch.config)
    except StartupError as error:
        EngineServer(socket).report_failure(error)
        return 1
    server = EngineServer(socket, publisher, door)
    settle()
    quiet.is_on = False
    try:
        server.run(core)
        core.close()
    except Exception:
        logger.exception("the engine loop failed")
        # Who was in the step has to arrive, even if it failed sooner than the message was sent.
        time.sleep(LAST_MESSAGES_SECONDS)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
