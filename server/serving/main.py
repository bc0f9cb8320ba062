"""`quire serve` from the bound socket to the exit: start, announce, drain, stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog
import uvloop

from ...engine.checkpoints.gguf_header import read_header
from ...engine.checkpoints.hub import check_folder_files
from ...engine.checkpoints.source import check_source, find_source
from ...engine.config import EngineInfo
from ...engine.errors import ModelLoadError, StartupError
from ...engine.fleet.directory import LocalEngines
from ...engine.fleet.fleet_client import FleetClient
from ...engine.parallel.host import run_host
from ...engine.process.engine_handle import engine_environment
from ...engine.process.heap import settle
from ...engine.process.process_client import ProcessEngineClient
from ..logs import resolve_format
from ..metrics.metrics import Metrics
from ..setting_sources import unknown_variables
from ..settings import DEMO_MODEL_NAME, Settings
from ..tenants.key_ring import KeySource
from ..tracing.start import check_tracing
from .http_server import build_app, make_metrics, routing_counter, uvicorn_server
from .listener import address_of, check_tls, listening
from .start_screen import show_loading, show_ready, terminal
from .system_limits import check_threads, raise_descriptor_limit
from .worker_pool import WorkerPool

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..requests.state import ServerState

MakeClient = Callable[..., ProcessEngineClient]
"""Takes the arguments of ProcessEngineClient, such as the class itself or a partial of it."""

Engine = ProcessEngineClient | FleetClient
"""The client of the engine that this process supervises, or of all engines."""

log = structlog.get_logger(__name__)


def serve(settings: Settings, make_client: MakeClient | None = None) -> None:
    """Serve until SIGTERM or SIGINT, with an engine client by `make_client` or ProcessEngineClient.

    Raises StartupError, before the model loads if the cause can be known by then.
    """
    for variable, advice in unknown_variables(Settings.model_fields).items():
        log.warning("unknown_variable", variable=variable, advice=advice)
    check_tls(settings)
    check_tracing(settings)
    raise_descriptor_limit()
    check_threads()
    check_model_files(settings)
    KeySource(settings)  # raises ConfigurationError if the file of keys is broken
    if settings.engine_config().node_rank > 0:
        follow(settings)
        return
    with listening(settings) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as run:
        check_repositories(settings)
        run.run(_serve(settings, listener, make_client or ProcessEngineClient))


def follow(settings: Settings) -> None:
    """Run the ranks of a host other than 0, which speak no HTTP, until SIGTERM or SIGINT."""
    config = settings.engine_config()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    environment = engine_environment(os.environ, config.num_threads)
    log_format = resolve_format(settings.log_format)
    run_host(config, environment, stop, log_level=settings.log_level, log_format=log_format)


def check_model_files(settings: Settings) -> None:
    """Raise StartupError if the model's folder or file is not there, or if the header of a GGUF
    file is broken: before the engine is started, which takes seconds."""
    source = find_source(settings.model_path, settings.engine_config().gguf_file)
    if source.gguf is not None:
        read_header(source.gguf)


def check_repositories(settings: Settings) -> None:
    """Raise StartupError if the model or an adapter is not there. This may ask the hub, for some
    seconds, so it comes after the socket is bound."""
    config = settings.engine_config()
    source = find_source(settings.model_path, config.gguf_file)
    check_source(source)
    if source.gguf is None and (folder := Path(settings.model_path).expanduser()).is_dir():
        check_folder_files(folder, weights=config.load_format == "auto")
    for adapter in settings.adapters:
        if not (adapter.folder / "adapter_config.json").is_file():
            reason = "has no adapter_config.json" if adapter.folder.is_dir() else "is no folder"
            raise ModelLoadError(f"--lora {adapter.name}: {adapter.folder} {reason}")


class Front(Protocol):
    """The HTTP side of a running server: this process, or a pool of workers."""

    async def run(self) -> None:
        """Serve until `stop`. Raises StartupError if it cannot."""

    async def wait_up(self) -> None:
        """Return once connections are accepted."""

    def begin_drain(self) -> None:
        """Refuse new requests from now on."""

    @property
    def num_unfinished(self) -> int:
        """The number of choices that clients still wait for."""

    def stop(self) -> None:
        """Close the connections and let `run` return."""


class _ThisProcess:
    """The Front for a single HTTP process: this one."""

    def __init__(self, settings: Settings, app: FastAPI, listener: socket.socket) -> None:
        self._server = uvicorn_server(settings, app)
        self._listener = listener
        self._state: ServerState = app.state.quire

    async def run(self) -> None:
        await self._server.serve(sockets=[self._listener])

    async def wait_up(self) -> None:
        """Return at once: connections are accepted long before the engine is ready."""

    def begin_drain(self) -> None:
        self._state.begin_drain()

    @property
    def num_unfinished(self) -> int:
        return self._state.in_flight.num_queued + self._state.in_flight.num_running

    def stop(self) -> None:
        self._server.should_exit = True


async def _serve(settings: Settings, listener: socket.socket, make_client: MakeClient) -> None:
    began = time.monotonic()
    stop = _stop_on_signals()
    metrics = make_metrics(settings)
    engine = _make_engine(settings, metrics, make_client)
    # 1. The engine loads the model in its own process while this one builds the HTTP side.
    announce_loading(settings)
    await engine.start()
    try:
        front: Front
        if settings.http_workers > 1:
            front = WorkerPool(settings, listener, engine, metrics)
        else:
            app = await asyncio.to_thread(build_app, settings, engine, metrics)
            front = _ThisProcess(settings, app, listener)
        serving = asyncio.create_task(front.run())
        loading = asyncio.create_task(_ready(engine, front))
        stopping = asyncio.create_task(stop.wait())
        given_up = asyncio.create_task(engine.wait_given_up())
        try:
            # 2. Both load, unless one of them fails or a signal comes first.
            started: set[asyncio.Future[Any]] = {serving, loading, stopping}
            await asyncio.wait(started, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                info = loading.result()
                settle()
                announce(settings, info, listener, time.monotonic() - began)
                # 3. Serve until a signal comes, the HTTP side fails, or the engine is given up.
                ends: set[asyncio.Future[Any]] = {serving, stopping, given_up}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if given_up.done() and not stop.is_set():
                    raise StartupError("the engine failed again and again: its log says why")
            if stop.is_set():
                await drain(front, engine, settings.shutdown_timeout)
        finally:
            # 4. Let the HTTP side send its last answers, then end the engine. An exception of
            # `serving` is raised here.
            front.stop()
            loading.cancel()
            stopping.cancel()
            given_up.cancel()
            await serving
    finally:
        await engine.close()


def _make_engine(settings: Settings, metrics: Metrics, make_client: MakeClient) -> Engine:
    """Return the client of the engine, or of all of them. Raises ConfigurationError if there are
    too few devices."""
    config = settings.engine_config()
    make = partial(
        make_client,
        stall_timeout=settings.engine_stall_timeout,
        log_level=settings.log_level,
        log_format=resolve_format(settings.log_format),
    )
    if settings.data_parallel_size == 1:
        return make(config, observer=metrics)
    engines = LocalEngines(config, settings.data_parallel_size, make, metrics.observer_of)
    return FleetClient(engines, on_routed=routing_counter(metrics))


async def _ready(engine: Engine, front: Front) -> EngineInfo:
    info = await engine.wait_ready()
    await front.wait_up()
    return info


def _stop_on_signals() -> asyncio.Event:
    """Return an event that the first SIGTERM, SIGINT or SIGHUP sets. A SIGINT after that ends the
    process at once. (nohup makes a process ignore SIGHUP; that is left as it is.)"""
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set() and number == signal.SIGINT:
            os._exit(128 + number)  # the engine process notices this and ends too
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue
        loop.add_signal_handler(number, on_signal, number)
    return stop


async def drain(front: Front, engine: Engine, timeout: float) -> None:
    """Refuse new requests, let running ones end, and after `timeout` seconds fail the rest."""
    front.begin_drain()
    log.info("draining", requests=front.num_unfinished, timeout=timeout)
    deadline = time.monotonic() + timeout
    while front.num_unfinished and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    log.info("stopping", unfinished=front.num_unfinished)
    await engine.close()


def announce_loading(settings: Settings) -> None:
    """Report what is loaded: as a log entry, or as text for a person."""
    if resolve_format(settings.log_format) == "json":
        log.info("loading", model=settings.model or DEMO_MODEL_NAME)
    else:
        show_loading(terminal(), settings)


def announce(settings: Settings, info: EngineInfo, listener: socket.socket, seconds: float) -> None:
    """Report the model, its KV cache and the address: as a log entry, or as text for a person."""
    address = address_of(settings, listener)
    draft_model = settings.engine_config().speculative_model
    if resolve_format(settings.log_format) == "json":
        log.info(
            "ready",
            model=info.model,
            served_names=settings.served_names,
            device=info.device,
            dtype=info.dtype,
            source_format=info.source_format,
            computed_format=info.computed_format,
            weight_bytes=info.weight_bytes,
            draft_model=draft_model,
            draft_weight_bytes=info.draft_weight_bytes,
            draft_kv_bytes=info.draft_kv_bytes_per_token * info.kv_capacity_tokens,
            max_model_len=info.max_model_len,
            num_blocks=info.num_blocks,
            kv_capacity_tokens=info.kv_capacity_tokens,
            layers_by_window=[
                {"layers": layers, "window": window}
                if window is None or window > 0
                else {"layers": layers, "chunk": -window}
                for window, layers in info.layers_by_window.items()
            ],
            engines=settings.data_parallel_size,
            full_length_sequences=round(info.kv_capacity_tokens / info.max_model_len, 1),
            address=address,
            seconds=round(seconds, 1),
        )
        return
    show_ready(terminal(), settings, info, address, seconds)
