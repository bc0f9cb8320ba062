"""`quire serve` from the bound socket to the exit: start, say so, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import ssl
import stat
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import structlog
import uvicorn
import uvloop

from ...engine.client import EngineClient
from ...engine.config import EngineInfo
from ...engine.errors import ConfigurationError
from ...engine.process.heap import settle
from ...engine.process.process_client import ProcessEngineClient
from ..logs import resolve_format
from ..metrics import Metrics
from ..settings import Settings
from ..text.torch_free import import_transformers
from .worker_pool import LAST_ANSWERS_SECONDS, WorkerPool

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..http.siblings import Siblings
    from ..requests.state import ServerState

KEEP_ALIVE_SECONDS = 75
"""Above the idle time of the usual load balancers, which must be the ones to close."""
BACKLOG = 2048

log = structlog.get_logger(__name__)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartupError, before the model loads if it can."""
    _check_tls(settings)
    with listening(settings) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as run:
        run.run(_serve(settings, listener))


@contextlib.contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """The listening socket; taken at once, so that nobody else can have it while we load."""
    if settings.uds is None:
        with _listen_tcp(settings.host, settings.port) as listener:
            yield listener
        return
    with _listen_unix(settings.uds) as listener:
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(settings.uds)


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(f"port {port} of {host} is taken") from error
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def _listen_unix(path: str) -> socket.socket:
    """Only the user's own processes may connect, unless the umask says otherwise."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"uds: cannot listen on {path}: {error}") from error
    except ConfigurationError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket of a server that was killed; raise where it is anything else."""
    if not os.path.exists(path):
        return
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise ConfigurationError(f"uds: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(path) == 0:
            raise ConfigurationError(f"uds: {path} is taken")
    os.unlink(path)


def _check_tls(settings: Settings) -> None:
    if settings.ssl_certfile is None or settings.ssl_keyfile is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            settings.ssl_certfile, settings.ssl_keyfile
        )
    except OSError as error:
        raise ConfigurationError(f"ssl_certfile, ssl_keyfile: {error}") from error


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which neither drain nor exit with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Front(Protocol):
    """What serves HTTP, once it runs: this process, or several."""

    async def run(self) -> None:
        """Serve until `stop`. Raises StartupError where it cannot."""

    async def wait_up(self) -> None:
        """Until connections are accepted."""

    def begin_drain(self) -> None: ...

    @property
    def num_unfinished(self) -> int:
        """Choices that clients still wait for."""

    def stop(self) -> None: ...


class _ThisProcess:
    """See `Front`."""

    def __init__(self, settings: Settings, app: FastAPI, listener: socket.socket) -> None:
        self._server = uvicorn_server(settings, app)
        self._listener = listener
        self._state: ServerState = app.state.quire

    async def run(self) -> None:
        await self._server.serve(sockets=[self._listener])

    async def wait_up(self) -> None:
        """It accepts long before the engine is ready."""

    def begin_drain(self) -> None:
        self._state.begin_drain()

    @property
    def num_unfinished(self) -> int:
        return self._state.in_flight.num_queued + self._state.in_flight.num_running

    def stop(self) -> None:
        self._server.should_exit = True


async def _serve(settings: Settings, listener: socket.socket) -> None:
    began = time.monotonic()
    stop = _stop_on_signals()
    metrics = Metrics(settings.served_names[0], settings.metrics_prefix)
    engine = ProcessEngineClient(
        settings.engine_config(),
        observer=metrics,
        stall_timeout=settings.engine_stall_timeout,
        log_level=settings.log_level,
        log_format=resolve_format(settings.log_format),
    )
    await engine.start()
    try:
        front: Front
        if settings.http_workers > 1:
            front = WorkerPool(settings, listener, engine, metrics)
        else:
            # In a thread, since the engine's own start goes on meanwhile.
            app = await asyncio.to_thread(build_app, settings, engine, metrics)
            front = _ThisProcess(settings, app, listener)
        serving = asyncio.create_task(front.run())
        loading = asyncio.create_task(_ready(engine, front))
        stopping = asyncio.create_task(stop.wait())
        try:
            started: set[asyncio.Future[Any]] = {serving, loading, stopping}
            await asyncio.wait(started, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                info = loading.result()
                settle()
                announce(settings, info, listener, time.monotonic() - began)
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                await drain(front, engine, settings.shutdown_timeout)
        finally:
            front.stop()
            loading.cancel()
            stopping.cancel()
            await serving
    finally:
        await engine.close()


async def _ready(engine: ProcessEngineClient, front: Front) -> EngineInfo:
    info = await engine.wait_ready()
    await front.wait_up()
    return info


def _stop_on_signals() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; another SIGINT ends the process at once."""
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set() and number == signal.SIGINT:
            os._exit(128 + number)  # the engine notices, and ends too
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


def build_app(
    settings: Settings,
    engine: EngineClient,
    metrics: Metrics,
    siblings: Siblings | None = None,
) -> FastAPI:
    """The application with its tokenizer. Raises StartupError."""
    if not settings.trust_remote_code:  # the model's own tokenizer may well use torch
        import_transformers()
    from ..text.tokenizer import Tokenizer
    from .app import create_app

    tokenizer = Tokenizer.load(
        settings.model_path,
        trust_remote_code=settings.trust_remote_code,
        chat_template=settings.chat_template,
    )
    return create_app(settings, engine, tokenizer, metrics, siblings)


def uvicorn_server(settings: Settings, app: FastAPI) -> uvicorn.Server:
    """An HTTP server under our own limits."""
    from ..http.http_protocol import MAX_HEADER_BYTES, GuardedH11Protocol, HeaderCountMiddleware

    config = uvicorn.Config(
        HeaderCountMiddleware(app),
        http=GuardedH11Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
    )
    return _Server(config)


async def drain(front: Front, engine: ProcessEngineClient, timeout: float) -> None:
    """Refuse new requests, let those in flight end, and after `timeout` seconds fail the rest."""
    front.begin_drain()
    log.info("draining", requests=front.num_unfinished, timeout=timeout)
    deadline = time.monotonic() + timeout
    while front.num_unfinished and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    log.info("stopping", unfinished=front.num_unfinished)
    await engine.close()


def announce(settings: Settings, info: EngineInfo, listener: socket.socket, seconds: float) -> None:
    """Say what serves where: a few lines for a person, or one log entry."""
    address = _address(settings, listener)
    sequences = info.kv_capacity_tokens / info.max_model_len
    if resolve_format(settings.log_format) == "json":
        log.info(
            "ready",
            model=info.model,
            served_names=settings.served_names,
            device=info.device,
            dtype=info.dtype,
            max_model_len=info.max_model_len,
            num_blocks=info.num_blocks,
            kv_capacity_tokens=info.kv_capacity_tokens,
            full_length_sequences=round(sequences, 1),
            address=address,
            seconds=round(seconds, 1),
        )
        return
    toy = "  a toy built into quire, for trying it out\n" if settings.is_demo else "\n"
    millions = info.num_parameters / 1e6
    print(
        f"quire is ready after {seconds:.1f} s\n"
        f"  model    {', '.join(settings.served_names)} "
        f"({info.architecture}, {millions:,.1f}M parameters){toy}"
        f"  device   {info.device}, {info.dtype}\n"
        f"  KV cache {info.num_blocks:,} blocks = {info.kv_capacity_tokens:,} tokens "
        f"= {sequences:,.1f} sequences of {info.max_model_len:,}\n"
        f"  address  {address}",
        file=sys.stderr,
    )


def _address(settings: Settings, listener: socket.socket) -> str:
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.ssl_certfile else 'http'}://{host}:{port}"
