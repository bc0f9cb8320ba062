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
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from . import wire
from .client import EngineHealth
from .config import EngineConfig, EngineInfo
from .errors import (
    EngineDeadError,
    EngineNotReadyError,
    InvalidRequestError,
    QuireError,
    ShuttingDownError,
    StartupError,
    error_from_code,
)
from .outputs import EngineStats, SequenceOutput
from .request import Request
from .streams import EngineObserver, StreamTable

REAL_CORE = "quire.engine.engine_process:build_core"
STOP_GRACE_SECONDS = 2.0
STACK_DUMP_SECONDS = 0.5
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
        self._draining = False
        self._restarts = 0
        self._info: EngineInfo | None = None
        self._stats: EngineStats | None = None
        self._resets: deque[asyncio.Future[None]] = deque()
        self._heard = asyncio.Event()
        """Set by each message that shows progress; the watchdog clears it."""
        self._settled = asyncio.Event()
        """The first start succeeded or failed."""
        self._start_error: StartupError | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._socket: zmq.asyncio.Socket | None = None

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
        ready = state is State.READY and not self._draining
        reason = "draining" if state is State.READY and self._draining else state.value
        return EngineHealth(alive, ready, reason, self._restarts)

    async def reset_prefix_cache(self) -> None:
        """Raises EngineNotReadyError, or EngineDeadError if the engine dies meanwhile."""
        self._require_ready()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._resets.append(done)
        self._send(wire.ResetPrefixCache())
        await done

    def drain(self) -> None:
        """Refuse new requests from now on and be not ready; the open streams go on."""
        self._draining = True

    @property
    def num_open_streams(self) -> int:
        return len(self._streams)

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
        with tempfile.TemporaryDirectory(prefix="quire-") as folder:  # mode 0700
            try:
                while True:
                    ready_at = await self._run_engine(Path(folder) / f"engine{self._restarts}")
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
            finally:
                if self._state is not State.CLOSED:
                    self._state = State.FAILED
                    logger.error("the engine is given up")
                self._settled.set()

    async def _run_engine(self, socket_path: Path) -> float | None:
        """Run one engine process to its end; the loop time at which it was ready, if ever."""
        address = f"ipc://{socket_path}"
        process = await self._launch(address)
        self._process = process
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.LINGER, 0)
        self._socket.connect(address)
        self._send(wire.Hello())
        self._ready_at: float | None = None
        helpers = [
            asyncio.create_task(self._read(self._socket), name="engine reader"),
            asyncio.create_task(self._watch(process), name="engine watchdog"),
        ]
        try:
            exited = asyncio.create_task(process.wait())
            # A helper ends only by a bug of ours; then the engine cannot be served either.
            await asyncio.wait([exited, *helpers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for helper in helpers:
                helper.cancel()
            await self._stop(process)
            results = await asyncio.gather(*helpers, return_exceptions=True)
            self._socket.close()
            for result in results:
                if isinstance(result, Exception):
                    logger.error("the engine's client failed", exc_info=result)
            self._engine_ended(process)
        return self._ready_at

    async def _launch(self, address: str) -> asyncio.subprocess.Process:
        environment = dict(os.environ)
        # Threads that spin between parallel regions starve the HTTP process.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
        if self._config.num_threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._config.num_threads)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "quire.engine.engine_process"),
            stdin=asyncio.subprocess.PIPE,
            env=environment,
        )
        launch = wire.Launch(self._config, address, self._core, self._log_level, self._log_format)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(launch) + b"\n")
        return process

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        """Close its stdin, which asks it to end; kill it if it does not."""
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_GRACE_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()

    def _engine_ended(self, process: asyncio.subprocess.Process) -> None:
        self._process = self._socket = None
        if self._state is State.CLOSED:
            return
        how = f"the engine process ended with code {process.returncode}"
        logger.error(how)
        if self._info is None and self._start_error is None:
            self._start_error = StartupError(f"{how} while starting; its log says why")
        if self._state is State.READY:
            self._state = State.RESTARTING
        self._fail_open(EngineDeadError("the engine died while it served the request"))

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill an engine that is silent for too long.

        Time counts tick by tick, none longer than planned: if this process was suspended or its
        loop blocked, the engine's messages get their chance to be read first.
        """
        tick = min(1.0, self._stall_timeout / 4)
        silence = 0.0
        while silence < self._stall_timeout:
            await asyncio.sleep(tick)
            silence = 0.0 if self._heard.is_set() or not self._serving else silence + tick
            self._heard.clear()
        logger.error("no sign of life from the engine for %.1f s: its stacks follow", silence)
        self._state = State.STALLED
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(STACK_DUMP_SECONDS)
            process.kill()
        await process.wait()

    @property
    def _serving(self) -> bool:
        return self._ready_at is not None

    # --- messages

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._handle(wire.decode_from_engine(await socket.recv()))

    def _handle(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Step(outputs, stats):
                self._streams.deliver(outputs)
                self._observe(stats)
            case wire.Heartbeat(stats):
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
                self._info = info
                self._ready_at = asyncio.get_running_loop().time()
                self._state = State.READY
                self._settled.set()
                if self._observer is not None:
                    self._observer.engine_ready(info)
            case wire.StartFailed(code, text):
                logger.error("the engine cannot start: %s", text)
                self._start_error = StartupError(text)
                assert self._process is not None and self._process.stdin is not None
                self._process.stdin.close()

    def _observe(self, stats: EngineStats) -> None:
        self._heard.set()
        self._stats = stats
        if self._observer is not None:
            self._observer.observe_step(stats)

    def _submit(self, request: Request) -> None:
        self._send(wire.Add(request))

    def _send(self, message: wire.ToEngine) -> None:
        """Never blocks: the socket has no high-water mark."""
        assert self._socket is not None
        self._socket.send(wire.encode(message))

    def _require_ready(self) -> None:
        if self._draining:
            raise ShuttingDownError("the server is shutting down")
        if self._state is not State.READY:
            raise EngineNotReadyError(self._state.value)

    def _fail_open(self, error: QuireError) -> None:
        self._streams.fail_all(error)
        while self._resets:
            done = self._resets.popleft()
            if not done.done():
                done.set_exception(error)
