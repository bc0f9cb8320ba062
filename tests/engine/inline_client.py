"""An EngineClient for tests, over a core that a thread of this process steps.

It behaves like the clients of an engine process, except that nothing supervises the core: a step
that raises ends it for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from quire.engine.config import EngineConfig, EngineInfo
from quire.engine.errors import EngineDeadError, QuireError, StartupError
from quire.engine.process import wire
from quire.engine.process.engine_process import EngineCoreProtocol
from quire.engine.process.remote_client import EngineObserver, RemoteEngineClient, State

logger = logging.getLogger("quire.engine.client")


class InlineEngineClient(RemoteEngineClient):
    """An `EngineClient` whose messages go to a thread instead of a process.

    `start` calls `core_factory` in that thread.
    """

    def __init__(
        self,
        config: EngineConfig,
        core_factory: Callable[[EngineConfig], EngineCoreProtocol],
        *,
        observer: EngineObserver | None = None,
    ) -> None:
        super().__init__(observer)
        self._config = config
        self._core_factory = core_factory
        self._inbox: deque[wire.ToEngine] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._settled = asyncio.Event()
        self._start_error: StartupError | None = None

    # --- on the event loop

    async def start(self) -> None:
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    async def wait_ready(self) -> EngineInfo:
        """Wait until the start has succeeded; raise StartupError if it fails."""
        await self._settled.wait()
        if self._start_error is not None:
            raise self._start_error
        return self.info

    async def close(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._end(State.CLOSED)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _send(self, message: wire.ToEngine) -> None:
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()

    def _handle(self, message: wire.FromEngine) -> None:
        if not self._stopping:
            super()._handle(message)
            self._settled.set()

    def _end(self, state: State) -> None:
        if self._state is not State.CLOSED:
            self._state = state
        self._fail_open(EngineDeadError(state.value))
        self._settled.set()

    # --- in the engine's thread

    def _run(self) -> None:
        try:
            core = self._core_factory(self._config)
        except Exception as error:
            logger.exception("the engine cannot start")
            self._start_error = (
                error if isinstance(error, StartupError) else StartupError(repr(error))
            )
            self._call(self._end, State.FAILED)
            return
        self._call(self._handle, wire.Ready(core.info))
        try:
            while self._handle_all(core):
                self._call(self._handle, wire.StepMessage(*core.step()))
        except Exception:
            logger.exception("the engine loop failed")
            self._call(self._end, State.FAILED)

    def _handle_all(self, core: EngineCoreProtocol) -> bool:
        """Handle the client's messages until there is work; return False when asked to stop."""
        while True:
            with self._wake:
                while not (self._inbox or core.has_work or self._stopping):
                    self._wake.wait()
                if self._stopping:
                    return False
                messages = list(self._inbox)
                self._inbox.clear()
            for message in messages:
                self._handle_one(core, message)
            if core.has_work:
                return True

    def _handle_one(self, core: EngineCoreProtocol, message: wire.ToEngine) -> None:
        match message:
            case wire.Add():
                request = message.received(time.monotonic())
                try:
                    core.add_request(request)
                except QuireError as error:
                    rejected = wire.Rejected.for_error(request.request_id, error)
                    self._call(self._handle, rejected)
            case wire.Abort(request_id, choice):
                core.abort_request(request_id, choice)
            case wire.ResetPrefixCache():
                core.reset_prefix_cache()
                self._call(self._handle, wire.PrefixCacheReset())

    def _call(self, callback: Callable[[Any], None], argument: object) -> None:
        """Run the callback on the event loop."""
        assert self._loop is not None
        # The loop may be closed already when a test ends without `close`.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, argument)
