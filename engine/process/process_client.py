"""EngineClient over an engine process that it starts, watches and restarts.

    start ─► STARTING ─Ready─► READY ─exit─► RESTARTING ─Ready─► READY
                 │               │ no step while work waits           │ too many failures
                 │ StartFailed   ▼                                    ▼
                 └──► FAILED   STALLED ─killed─► RESTARTING         FAILED

The HTTP process survives a crash, and so do its streams: they wait for the engine's restart and go
on where they stopped. Only if the engine is given up do they end with `engine_dead`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from ..config import EngineConfig, EngineInfo
from ..errors import EngineDeadError, StartupError
from ..network.keys import Endpoint
from . import wire
from .engine_handle import EngineHandle
from .json_logs import LogFormat
from .private_folder import private_folder
from .remote_client import EngineObserver, EngineStatus, RemoteEngineClient, State
from .streams import StreamTable

REAL_CORE = "quire.engine.process.engine_process:build_core"
"""The core to step, as "module:function": the real engine."""
STABLE_SECONDS = 60.0
"""Time of service after which an engine's earlier failures are forgotten."""
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.5, 30.0
"""Bounds of the delay before a restart, which doubles with each failure in a row."""

logger = logging.getLogger("quire.engine.client")


class ProcessEngineClient(RemoteEngineClient):
    """An `EngineClient` that supervises the engine. Use it only on the event loop of `start`.

    The engine is killed and restarted if it makes no progress with its work, or sends no heartbeat
    while idle, for `stall_timeout` seconds; loading may take any time. After more than
    `max_restarts` failures in a row the engine is given up. `core` ("module:function") is what the
    process steps; tests pass a fake.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        observer: EngineObserver | None = None,
        stall_timeout: float = 120.0,
        max_restarts: int = 5,
        log_level: str = "info",
        log_format: LogFormat = "console",
        core: str = REAL_CORE,
        streams: StreamTable | None = None,
        environment: Mapping[str, str] | None = None,
        listen: str | None = None,
    ) -> None:
        """`environment` holds variables of the engine's process that differ from this one's, and
        `listen` is where the engine serves clients of other machines."""
        super().__init__(observer, streams)
        self._environment = environment or {}
        self._listen = listen
        self.endpoint: Endpoint | None = None
        """Where the engine serves clients of other machines; None while it does not."""
        self._config = config
        self._stall_timeout = stall_timeout
        self._max_restarts = max_restarts
        self._log_level = log_level
        self._log_format = log_format
        self._core = core

        self.on_status: Callable[[EngineStatus], None] | None = None
        """Called with each change of `status`, to pass it on to other clients of the engine. Set it
        before `start`: then the engine's socket keeps its file, so that they can connect."""
        self._engine: EngineHandle | None = None
        self._heard = False
        """Whether the engine has shown progress since the watchdog last looked."""
        self._settled = asyncio.Event()
        """Set when the first start has succeeded or failed."""
        self._start_error: StartupError | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._ready_at: float | None = None
        """Loop time at which the present engine process became ready."""

    # --- EngineClient

    async def start(self) -> None:
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self) -> EngineInfo:
        """Wait until the first start has succeeded. Raises StartupError if it fails."""
        await self._settled.wait()
        if self._start_error is not None:
            raise self._start_error
        return self.info

    async def wait_given_up(self) -> None:
        """Wait until the engine has failed so often that it is not started again."""
        assert self._supervisor is not None
        await asyncio.wait({self._supervisor})
        if self._state is not State.FAILED:
            await asyncio.Event().wait()  # it was closed, so it never will be

    @property
    def status(self) -> EngineStatus:
        """The engine's present status, to pass on to its other clients."""
        engine = self._engine if self._state is State.READY else None
        return EngineStatus(self._state, self._restarts, engine.address if engine else None)

    def client_gone(self, name: bytes) -> None:
        """Make the engine end the requests of another client, which has died."""
        if self._state is State.READY:
            self._send(wire.ClientGone(name))

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
        """Run one engine process after another, until a start fails or too many have failed."""
        failures = 0
        loop = asyncio.get_running_loop()
        try:
            while True:
                ready_at = await self._run_engine()
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
                if self._info is not None:  # a failed first start is reported by wait_ready
                    logger.error("giving up on the engine")
                self._fail_open(EngineDeadError("the engine died while it served the request"))
            self._settled.set()

    async def _run_engine(self) -> float | None:
        """Run one engine process to its end. Return the loop time when it became ready, or None.

        What keeps it from being started, such as a lack of descriptors, may pass, so it is a
        failure like others.
        """
        self._ready_at = None
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(private_folder())
                engine = await EngineHandle.launch(
                    self._launch(f"ipc://{folder / 'engine'}"), self._environment
                )
            except OSError as error:
                reason = error.strerror or str(error)
                logger.error("the engine process cannot be started: %s", reason)
                self._start_error = StartupError(f"the engine process cannot be started: {reason}")
                return None
            await self._serve_engine(engine)
        return self._ready_at

    def _launch(self, address: str) -> wire.Launch:
        return wire.Launch(
            *(self._config, address, self._core, self._log_level, self._log_format, self._listen)
        )

    async def _serve_engine(self, engine: EngineHandle) -> None:
        """Talk to an engine process until it ends."""
        self._engine = engine
        helpers = [
            asyncio.create_task(self._read(engine), name="engine reader"),
            asyncio.create_task(self._watch(engine), name="engine watchdog"),
        ]
        try:
            exited = asyncio.create_task(engine.wait())
            # A helper ends only by a bug, and without it the engine is of no use.
            await asyncio.wait([exited, *helpers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for helper in helpers:
                helper.cancel()
            results = await asyncio.gather(*helpers, return_exceptions=True)
            self._engine = self.endpoint = None
            await self._engine_ended(engine)
        for result in results:
            if isinstance(result, Exception):
                logger.error("the engine's client failed", exc_info=result)

    async def _engine_ended(self, engine: EngineHandle) -> None:
        if self._state is State.READY:
            self._state = State.RESTARTING
        self._tell()
        if self._state is not State.CLOSED:
            self._lose_engine()
        await engine.stop()
        if self._state is State.CLOSED:
            return
        how = f"the engine process ended with code {engine.returncode}"
        if self._info is not None:
            logger.error(how)
        elif self._start_error is None:
            self._start_error = StartupError(f"{how} while starting; its log says why")

    async def _watch(self, engine: EngineHandle) -> None:
        """Kill an engine that is silent for too long after it has become ready.

        Silence is counted in ticks rather than read from a clock. If this process was suspended or
        its event loop blocked, that adds at most one tick, and the engine's waiting messages are
        read before the next one.
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
        self._lose_engine()
        await engine.dump_and_kill()

    # --- messages

    async def _read(self, engine: EngineHandle) -> None:
        """Handle the engine's messages for as long as it runs."""
        while True:
            message = await engine.receive()
            self._handle(message)
            match message:
                case wire.StepMessage():
                    self._heard = True
                case wire.Heartbeat(_, num_open):
                    # An idle engine with an open request has lost it: that counts as a stall, too.
                    lost = num_open or self._streams.num_unfinished(self)
                    self._heard = self._heard or not lost
                case wire.Adapters(_, adapters):
                    self._config = replace(self._config, lora=adapters)
                case wire.Ready(info, endpoint):
                    self.endpoint = endpoint
                    self._config = _for_restart(self._config, info)
                    if self.on_status is None:
                        engine.hide_socket()
                    self._ready_at = asyncio.get_running_loop().time()
                    self._settled.set()
                    self._tell()
                case wire.StartFailed(_, text):
                    if self._info is not None:
                        logger.error("the engine cannot restart: %s", text)
                    self._start_error = StartupError(text)
                    engine.ask_to_end()

    def _tell(self) -> None:
        if self.on_status is not None:
            self.on_status(self.status)


def _for_restart(config: EngineConfig, info: EngineInfo) -> EngineConfig:
    """Return the configuration with which an engine that was ready starts again: with the LoRA
    adapters that it has, of which one that has vanished since does not keep it from starting."""
    if info.max_lora_rank is None:
        return config
    return replace(
        config, lora=info.adapters, max_lora_rank=info.max_lora_rank, skip_broken_lora=True
    )
