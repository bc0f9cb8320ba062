"""EngineClient over a process of its own, which it supervises.

    start ─► STARTING ─Ready─► READY ─exit─► RESTARTING ─Ready─► READY
                 │               │ no step while work waits           │ too many failures
                 │ StartFailed   ▼                                    ▼
                 └──► FAILED   STALLED ─killed─► RESTARTING         FAILED

A crash ends the open streams with `engine_dead`; the HTTP process lives on.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import tempfile
from collections import deque
from collections.abc import AsyncGenerator
from pathlib import Path

from . import wire
from .client import EngineHealth
from .config import EngineConfig, EngineInfo
from .engine_handle import EngineHandle
from .errors import (
    EngineDeadError,
    EngineNotReadyError,
    InvalidRequestError,
    QuireError,
    StartupError,
    error_from_code,
)
from .outputs import EngineStats, SequenceOutput
from .request import Request
from .streams import EngineObserver, StreamTable

REAL_CORE = "quire.engine.engine_process:build_core"
STABLE_SECONDS = 60.0
"""An engine that served this long has its earlier failures forgotten."""
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.5, 30.0

logger = logging.getLogger("quire.engine.client")


class State(enum.Enum):
    STARTING = "the engine is starting"
    READY = "ready"
    STALLED = "no step finishes; the engine is being restarted"
    RESTARTING = "the engine is restarting"
    FAILED = "the engine has failed too often and was given up"
    CLOSED = "the engine is stopped"


class ProcessEngineClient:
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
        self._config = config
        self._observer = observer
        self._stall_timeout = stall_timeout
        self._max_restarts = max_restarts
        self._log_level: str = log_level
        self._log_format: wire.LogFormat = log_format
        self._core = core

        self._streams = StreamTable(self._submit, self.abort)
        self._state = State.STARTING
        self._restarts = 0
        self._info: EngineInfo | None = None
        self._stats: EngineStats | None = None
        self._resets: deque[asyncio.Future[None]] = deque()
        self._heard = False
        """Progress was seen since the watchdog last looked."""
        self._settled = asyncio.Event()
        """The first start succeeded or failed."""
        self._start_error: StartupError | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._engine: EngineHandle | None = None
        self._ready_at: float | None = None
        """Loop time at which this life of the engine began to serve."""

    # --- EngineClient

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineNotReadyError(self._state.value)
        return self._info

    async def start(self) -> None:
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self) -> EngineInfo:
        """Wait for the first start to end. Raises StartupError if it failed."""
        await self._settled.wait()
        if self._start_error is not None:
            raise self._start_error
        return self.info

    async def generate(self, request: Request) -> AsyncGenerator[SequenceOutput, None]:
        self._require_ready()
        async with contextlib.aclosing(self._streams.generate(request)) as outputs:
            async for output in outputs:
                yield output

    def abort(self, request_id: str, choice: int | None = None) -> None:
        if self._state is State.READY:
            self._send(wire.Abort(request_id, choice))

    def stats(self) -> EngineStats | None:
        return self._stats

    def health(self) -> EngineHealth:
        state = self._state
        alive = state not in (State.STALLED, State.FAILED, State.CLOSED)
        return EngineHealth(alive, state is State.READY, state.value, self._restarts)

    async def reset_prefix_cache(self) -> None:
        """Raises EngineNotReadyError, or EngineDeadError if the engine dies meanwhile."""
        self._require_ready()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._resets.append(done)
        self._send(wire.ResetPrefixCache())
        await done

    @property
    def engine_pid(self) -> int | None:
        """The engine's process, while there is one."""
        return self._engine.pid if self._engine else None

    async def close(self) -> None:
        supervisor = self._supervisor
        if self._state is not State.FAILED:
            self._state = State.CLOSED
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
        await engine.dump_and_kill()

    # --- messages

    async def _read(self, engine: EngineHandle) -> None:
        while True:
            self._handle(engine, await engine.receive())

    def _handle(self, engine: EngineHandle, message: wire.FromEngine) -> None:
        match message:
            case wire.Step(outputs, stats):
                self._streams.deliver(outputs)
                self._heard = True
                self._observe(stats)
            case wire.Heartbeat(stats):
                # An idle engine with a request open has lost it, and that is a stall too.
                self._heard = self._heard or not self._streams.num_unfinished
                self._observe(stats)
            case wire.Rejected(request_id, code, text, param):
                error = error_from_code(code, text)
                if isinstance(error, InvalidRequestError):
                    error.param = param
                self._streams.reject(request_id, error)
            case wire.PrefixCacheReset():
                done = self._resets.popleft()
                if not done.done():
                    done.set_result(None)
            case wire.Ready(info):
                engine.hide_socket()
                self._info = info
                self._ready_at = asyncio.get_running_loop().time()
                self._state = State.READY
                self._settled.set()
                if self._observer is not None:
                    self._observer.engine_ready(info)
            case wire.StartFailed(code, text):
                logger.error("the engine cannot start: %s", text)
                self._start_error = StartupError(text)
                engine.ask_to_end()

    def _observe(self, stats: EngineStats) -> None:
        self._stats = stats
        if self._observer is not None:
            self._observer.observe_step(stats)

    def _submit(self, request: Request) -> None:
        self._send(wire.Add(request))

    def _send(self, message: wire.ToEngine) -> None:
        if self._engine is None:
            raise EngineNotReadyError(self._state.value)
        self._engine.send(message)

    def _require_ready(self) -> None:
        if self._state is not State.READY:
            raise EngineNotReadyError(self._state.value)

    def _fail_open(self, error: QuireError) -> None:
        self._streams.fail_all(error)
        while self._resets:
            done = self._resets.popleft()
            if not done.done():
                done.set_exception(error)
