"""The engine's own process: `python -P -m quire.engine.engine_process`, started by its client.

It lives as long as its stdin is open: the client closes it to stop the engine, the kernel closes
it if the client dies. SIGUSR1 dumps every thread's stack to stderr. (-P, because with the
repository's root on sys.path transformers would take the folder `kernels` for a package.)
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable

import msgspec
import zmq

from . import wire
from .config import EngineConfig
from .errors import QuireError, StartupError
from .outputs import StepOutput
from .streams import EngineCoreProtocol

PR_SET_PDEATHSIG = 1

logger = logging.getLogger("quire.engine")


def build_core(config: EngineConfig) -> EngineCoreProtocol:
    """The real engine: weights loaded, memory profiled, warmed up. Raises StartupError."""
    from .engine_core import EngineCore
    from .worker import Worker

    return EngineCore(config, Worker(config))


class EngineServer:
    """Steps one core for one client. `socket` is a bound ROUTER."""

    def __init__(self, socket: zmq.SyncSocket) -> None:
        self._socket = socket
        self._client: bytes | None = None
        self._stdin = sys.stdin.fileno()
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._stdin, zmq.POLLIN)

    def run(self, core: EngineCoreProtocol) -> None:
        """Serve until stdin closes. Whatever `step()` raises ends the process."""
        self._answer_hello(wire.Ready(core.info))
        heartbeat_ms = int(wire.HEARTBEAT_SECONDS * 1000)
        while self._poll(0 if core.has_work else heartbeat_ms):
            for message in self._receive_all():
                self._handle(core, message)
            if core.has_work:
                self._send_step(core.step())
            else:
                self._send(wire.Heartbeat(core.stats()))

    def report_failure(self, error: StartupError) -> None:
        """Tell the client why the start failed, and wait until it has heard."""
        self._answer_hello(wire.StartFailed(error.code, error.message))
        while self._poll(None):
            self._receive_all()

    def _poll(self, timeout_ms: int | None) -> bool:
        """Wait for a message at most `timeout_ms`; False once stdin is closed."""
        ready = dict(self._poller.poll(timeout_ms))
        # Nothing is ever written to stdin, so readable means closed.
        return self._stdin not in ready

    def _answer_hello(self, message: wire.FromEngine) -> None:
        while self._client is None and self._poll(None):
            self._receive_all()
        self._send(message)

    def _receive_all(self) -> list[wire.ToEngine]:
        """All that arrived, in order; what cannot be read is logged and dropped."""
        messages: list[wire.ToEngine] = []
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
                self._client = sender
            elif sender != self._client:
                logger.warning("dropped a message from a stranger")
            else:
                messages.append(message)

    def _handle(self, core: EngineCoreProtocol, message: wire.ToEngine) -> None:
        match message:
            case wire.Add(request):
                try:
                    core.add_request(request)
                except QuireError as error:
                    param = getattr(error, "param", None)
                    rejected = wire.Rejected(request.request_id, error.code, error.message, param)
                    self._send(rejected)
            case wire.Abort(request_id, choice):
                core.abort_request(request_id, choice)
            case wire.ResetPrefixCache():
                core.reset_prefix_cache()
                self._send(wire.PrefixCacheReset())

    def _send_step(self, step: StepOutput) -> None:
        self._send(wire.Step(step.outputs, step.stats))

    def _send(self, message: wire.FromEngine) -> None:
        if self._client is not None:
            self._socket.send_multipart([self._client, wire.encode(message)])


def _bind(address: str) -> zmq.SyncSocket:
    context: zmq.SyncContext = zmq.Context.instance()
    socket = context.socket(zmq.ROUTER)
    # No high-water mark: a ROUTER would drop outputs beyond it.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(address)
    return socket


def _die_with_parent() -> None:
    """SIGKILL when the parent dies, even in the middle of a hung step (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prepare_process(launch: wire.Launch) -> None:
    os.dup2(2, 1)
    if launch.log_format == "json":
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are no JSON
    # A terminal's Ctrl-C reaches the whole process group; the client decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if launch.log_format == "json"
        else logging.Formatter(
            "%(asctime)s [%(levelname)s] engine: %(message)s", datefmt="%Y-%m-%dT%H:%M:%S"
        )
    )
    logging.basicConfig(level=launch.log_level.upper(), handlers=[handler], force=True)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the keys that the server's own log has."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "source": "engine",
            "logger": record.name,
            "event": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


def _load_core_factory(path: str) -> Callable[[EngineConfig], EngineCoreProtocol]:
    module, _, function = path.partition(":")
    factory: Callable[[EngineConfig], EngineCoreProtocol]
    factory = getattr(importlib.import_module(module), function)
    return factory


def main() -> int:
    """Exit code 0 when told to stop, 1 after a crash or a failed start."""
    _die_with_parent()
    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    launch = msgspec.json.decode(line, type=wire.Launch)
    _prepare_process(launch)
    server = EngineServer(_bind(launch.address))
    try:
        core = _load_core_factory(launch.core)(launch.config)
    except StartupError as error:
        server.report_failure(error)
        return 1
    # What loading left behind is walked by no later collection.
    gc.collect()
    gc.freeze()
    try:
        server.run(core)
    except Exception:
        logger.exception("the engine loop failed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
