"""The engine's own process.

A client starts it as `python -P -m quire.engine.process.engine_process`.

It lives as long as its stdin is open: that client closes it to stop the engine, the kernel closes
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
from typing import NamedTuple

import msgspec
import zmq

from ..config import EngineConfig
from ..errors import QuireError, StartupError
from ..outputs import SequenceOutput, StepOutput
from . import wire
from .heap import settle
from .streams import EngineCoreProtocol

PR_SET_PDEATHSIG = 1

logger = logging.getLogger("quire.engine")


def build_core(config: EngineConfig) -> EngineCoreProtocol:
    """The real engine: weights loaded, memory profiled, warmed up. Raises StartupError."""
    # These imports make a million objects that stay. Walking them again and again would take a
    # tenth of the imports' time, and walking them once while weights are loaded half a second.
    gc.disable()
    if not config.trust_remote_code:  # the model's own code may well use it
        _leave_triton_out(config)
    from ..runner.first_start import compile_ahead

    compile_ahead(config)
    from ..core.engine_core import EngineCore
    from ..runner.worker import Worker

    gc.freeze()
    gc.enable()
    return EngineCore(config, Worker(config))


def _leave_triton_out(config: EngineConfig) -> None:
    """On the CPU be as where triton is not installed, as it is not with torch's build for CPUs.

    transformers imports torch._dynamo, and that triton where it finds it: 70 MB. None in
    sys.modules is Python's own way to say that a module is not there.
    """
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        sys.modules.setdefault("triton", None)  # type: ignore[arg-type]


class _OpenRequest(NamedTuple):
    client: bytes
    open_choices: set[int]


class EngineServer:
    """Steps one core for its clients. `socket` is a bound ROUTER."""

    def __init__(self, socket: zmq.SyncSocket) -> None:
        self._socket = socket
        self._clients: list[bytes] = []
        self._gone: set[bytes] = set()
        """Clients that are dead, though messages of theirs may still be waiting."""
        self._open: dict[str, _OpenRequest] = {}
        self._greeting: wire.FromEngine | None = None
        self._stdin = sys.stdin.fileno()
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._stdin, zmq.POLLIN)

    def run(self, core: EngineCoreProtocol) -> None:
        """Serve until stdin closes. Whatever `step()` raises ends the process."""
        self._greeting = wire.Ready(core.info)
        heartbeat_ms = int(wire.HEARTBEAT_SECONDS * 1000)
        while self._poll(0 if core.has_work else heartbeat_ms):
            for client, message in self._receive_all():
                self._handle(core, client, message)
            if core.has_work:
                self._send_step(core.step())
            else:
                heartbeat = wire.encode(wire.Heartbeat(core.stats(), len(self._open)))
                for client in self._clients:
                    self._send(client, heartbeat)

    def report_failure(self, error: StartupError) -> None:
        """Tell the clients why the start failed, until they end this process."""
        self._greeting = wire.StartFailed(error.code, error.message)
        while self._poll(None):
            self._receive_all()

    def _poll(self, timeout_ms: int | None) -> bool:
        """Wait for a message at most `timeout_ms`; False once stdin is closed."""
        ready = dict(self._poller.poll(timeout_ms))
        # Nothing is ever written to stdin, so readable means closed.
        return self._stdin not in ready

    def _receive_all(self) -> list[tuple[bytes, wire.ToEngine]]:
        """All that arrived, in order; what cannot be read is logged and dropped."""
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
                self._greet(sender)
            elif sender not in self._clients:
                logger.warning("dropped a message from a stranger")
            else:
                messages.append((sender, message))

    def _greet(self, client: bytes) -> None:
        if client in self._gone or client in self._clients:
            return
        self._clients.append(client)
        assert self._greeting is not None
        self._send(client, wire.encode(self._greeting))

    def _handle(self, core: EngineCoreProtocol, client: bytes, message: wire.ToEngine) -> None:
        match message:
            case wire.Add(request):
                try:
                    core.add_request(request)
                except QuireError as error:
                    param = getattr(error, "param", None)
                    rejected = wire.Rejected(request.request_id, error.code, error.message, param)
                    self._send(client, wire.encode(rejected))
                else:
                    choices = set(range(request.sampling_params.n))
                    self._open[request.request_id] = _OpenRequest(client, choices)
            case wire.Abort(request_id, choice):
                core.abort_request(request_id, choice)
            case wire.ResetPrefixCache():
                core.reset_prefix_cache()
                self._send(client, wire.encode(wire.PrefixCacheReset()))
            case wire.ClientGone(dead):
                self._forget(core, dead)

    def _forget(self, core: EngineCoreProtocol, client: bytes) -> None:
        self._gone.add(client)
        if client in self._clients:
            self._clients.remove(client)
        for request_id in [key for key, entry in self._open.items() if entry.client == client]:
            del self._open[request_id]
            core.abort_request(request_id)

    def _send_step(self, step: StepOutput) -> None:
        """To each client the outputs of its requests, in one message."""
        if len(self._clients) > 1 or self._gone:
            shares: dict[bytes, list[SequenceOutput]] = {client: [] for client in self._clients}
            for output in step.outputs:
                request = self._open.get(output.request_id)
                if request is not None:  # else its client is gone
                    shares[request.client].append(output)
        else:
            shares = dict.fromkeys(self._clients, step.outputs)
        for client, outputs in shares.items():
            self._send(client, wire.encode(wire.Step(outputs, step.stats)))
        for output in step.outputs:
            if output.finish_reason is not None and output.request_id in self._open:
                choices = self._open[output.request_id].open_choices
                choices.discard(output.choice)
                if not choices:
                    del self._open[output.request_id]

    def _send(self, client: bytes, message: bytes) -> None:
        self._socket.send_multipart([client, message])


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


def die_with_parent() -> None:
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
    die_with_parent()
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
    settle()
    try:
        server.run(core)
    except Exception:
        logger.exception("the engine loop failed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
