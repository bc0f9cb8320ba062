"""EngineClient over a process of its own, which it supervises.

    start ─► STARTING ─Ready─► READY ─exit─► RESTARTING ─Ready─► READY
                 │               │ no step while work waits           │ too many failures
                 │ StartFailed   ▼                                    ▼
                 └──► FAILED   STALLED ─killed─► RESTARTING         FAILED

A crash ends the open streams with `engine_dead`; the HTTP process lives on.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..config import EngineConfig, EngineInfo
from ..errors import EngineDeadError, StartupError
from . import wire
from .engine_handle import EngineHandle
from .remote_client import EngineStatus, RemoteEngineClient, State
from .streams import EngineObserver

REAL_CORE = "quire.engine.process.engine_process:build_core"
STABLE_SECONDS = 60.0
"""An engine that served this long has its earlier failures forgotten."""
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.5, 30.0

logger = logging.getLogger("quire.engine.client")


class ProcessEngineClient(RemoteEngineClient):
    """See `EngineClient`. Use it on the one event loop that `start` ran on.

    `stall_timeout` is in seconds: with work waiting, or silence while idle, for longer than this
    the engine is killed and restarted (loading is exempt). `max_restarts` counts failures in a
    row. `core` is for tests: what the process steps, as "module:function".
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        observer: EngineObserver | None = None,
        stall_timeout: float = 120.0,
        max_restarts: int = 5,
        log_level: str = "info",
        log_format: wire.LogFormat = "console",
        core: str = REAL_CORE,
    ) -> None:
        super().__init__(observer)
        self._config = config
        self._stall_timeout = stall_timeout
        self._max_restarts = max_restarts
        self._log_level: str = log_level
        self._log_format: wire.LogFormat = log_format
        self._core = core

        self.on_status: Callable[[EngineStatus], None] | None = None
        """Called with each change, for whoever passes it on to other clients of the engine. Set it
        before `start`: the engine's socket keeps its name then, for them to connect to."""
        self._engine: EngineHandle | None = None
        self._heard = False
        """Progress was seen since the watchdog last looked."""
        self._settled = asyncio.Event()
        """The first start succeeded or failed."""
        self._start_error: StartupError | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._ready_at: float | None = None
        """Loop time at which this life of the engine began to serve."""

    # --- EngineClient

    async def start(self) -> None:
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self) -> EngineInfo:
        """Wait for the first start to end. Raises StartupError if it failed."""
        await self._settled.wait()
        if self._start_error is not None:
            raise self._start_error
        return self.info

    @property
    def status(self) -> EngineStatus:
        engine = self._engine if self._state is State.READY else None
        return EngineStatus(self._state, self._restarts, engine.address if engine else None)

    def client_gone(self, name: bytes) -> None:
        """Another client has died: the engine ends its requests."""
        if self._state is State.READY:
            self._send(wire.ClientGone(name))

    @property
    def engine_pid(self) -> int | None:
        """The engine's process, while there is one."""
        return self._engine.pid if self._engine else None

    async def close(self) -> None:
        supervisor = self._supervisor
        if self._state is not State.FAILED:
            self._state = State.CLOSED
        self._tell()
        self._fail_open(EngineDeadError("the engine was stopped"))
        if supervisor is not None and not supervisor.done():
            supervisor.cancel()
            await asyncio.wait([supervisor])

    # --- supervision

    async def _supervise(self) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        try:
            while True:
                with tempfile.TemporaryDirectory(prefix="quire-") as folder:  # mode 0700
                    ready_at = await self._run_engine(Path(folder) / "engine")
                served = ready_at is not None and loop.time() - ready_at > STABLE_SECONDS
                failures = 1 if served else failures + 1
                if self._info is None or failures > self._max_restarts:
                    break
                self._restarts += 1
                if self._state is not State.STALLED:
                    self._state = State.RESTARTING
                self._tell()
                if self._observer is not None:
                    self._observer.engine_restarted()
                delay = min(FIRST_DELAY_SECONDS * 2 ** (failures - 1), MAX_DELAY_SECONDS)
                logger.warning("restarting the engine in %.1f s", delay)
                await asyncio.sleep(delay)
        except Exception as error:
            logger.exception("the engine's supervisor failed")
            self._start_error = StartupError(f"the engine's supervisor failed: {error}")
        finally:
            if self._state is not State.CLOSED:
                self._state = State.FAILED
                self._tell()
                logger.error("the engine is given up")
            self._settled.set()

    async def _run_engine(self, socket_path: Path) -> float | None:
        """Run one engine process to its end; the loop time at which it was ready, if ever."""
        address = f"ipc://{socket_path}"
        self._ready_at = None
        launch = wire.Launch(self._config, address, self._core, self._log_level, self._log_format)
        try:
            engine = await EngineHandle.launch(launch)
        except OSError as error:
            logger.error("the engine process cannot be started: %s", error)
            self._start_error = StartupError(f"the engine process cannot be started: {error}")
            return None
        self._engine = engine
        helpers = [
            asyncio.create_task(self._read(engine), name="engine reader"),
            asyncio.create_task(self._watch(engine), name="engine watchdog"),
        ]
        try:
            exited = asyncio.create_task(engine.wait())
            # A helper ends only by a bug of ours; then the engine cannot be served either.
            await asyncio.wait([exited, *helpers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for helper in helpers:
                helper.cancel()
            results = await asyncio.gather(*helpers, return_exceptions=True)
            self._engine = None
            await self._engine_ended(engine)
        for result in results:
            if isinstance(result, Exception):
                logger.error("the engine's client failed", exc_info=result)
        return self._ready_at

    async def _engine_ended(self, engine: EngineHandle) -> None:
        if self._state is State.READY:
            self._state = State.RESTARTING
        self._tell()
        self._fail_open(EngineDeadError("the engine died while it served the request"))
        await engine.stop()
        if self._state is State.CLOSED:
            return
        how = f"the engine process ended with code {engine.returncode}"
        logger.error(how)
        if self._info is None and self._start_error is None:
            self._start_error = StartupError(f"{how} while starting; its log says why")

    async def _watch(self, engine: EngineHandle) -> None:
        """Kill an engine that is silent for too long; loading may take any time.

        Time counts tick by tick, none longer than planned: if this process was suspended or its
        loop blocked, the engine's messages get their chance to be read first.
        """
        tick = min(1.0, self._stall_timeout / 4)
        silence = 0.0
        while silence < self._stall_timeout:
            await asyncio.sleep(tick)
            heard = self._heard or self._ready_at is None
            silence = 0.0 if heard else silence + tick
            self._heard = False
        logger.error("no sign of life from the engine for %.1f s: its stacks follow", silence)
        self._state = State.STALLED
        self._tell()
        await engine.dump_and_kill()

    # --- messages

    async def _read(self, engine: EngineHandle) -> None:
        while True:
            message = await engine.receive()
            self._handle(message)
            match message:
                case wire.Step():
                    self._heard = True
                case wire.Heartbeat(_, num_open):
                    # An idle engine with a request open has lost it, and that is a stall too.
                    lost = num_open or self._streams.num_unfinished
                    self._heard = self._heard or not lost
                case wire.Ready():
                    if self.on_status is None:
                        engine.hide_socket()
                    self._ready_at = asyncio.get_running_loop().time()
                    self._settled.set()
                    self._tell()
                case wire.StartFailed(_, text):
                    logger.error("the engine cannot start: %s", text)
                    self._start_error = StartupError(text)
                    engine.ask_to_end()

    def _tell(self) -> None:
        if self.on_status is not None:
            self.on_status(self.status)
