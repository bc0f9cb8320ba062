"""EngineClient over a core stepped by a thread of this process: for tests and tools.

Same behaviour as the process client, except that nothing supervises the core: a step that raises
ends it for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from functools import partial

from .client import EngineHealth
from .config import EngineConfig, EngineInfo
from .errors import EngineDeadError, EngineNotReadyError, QuireError, StartupError
from .outputs import EngineStats, SequenceOutput, StepOutput
from .process.streams import EngineCoreProtocol, EngineObserver, StreamTable
from .request import Request

logger = logging.getLogger("quire.engine.client")

Command = Callable[[EngineCoreProtocol], None]


class InlineEngineClient:
    """See `EngineClient`. `core_factory` is called in the engine's thread by `start`."""

    def __init__(
        self,
        config: EngineConfig,
        core_factory: Callable[[EngineConfig], EngineCoreProtocol],
        *,
        observer: EngineObserver | None = None,
    ) -> None:
        self._config = config
        self._core_factory = core_factory
        self._observer = observer
        self._streams = StreamTable(self._submit, self.abort)
        self._commands: deque[Command] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._settled = asyncio.Event()
        self._start_error: StartupError | None = None
        self._info: EngineInfo | None = None
        self._stats: EngineStats | None = None
        self._resets: set[asyncio.Future[None]] = set()
        self._health = EngineHealth(True, False, "the engine is starting", 0)

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineNotReadyError(self._health.reason)
        return self._info

    async def start(self) -> None:
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    async def wait_ready(self) -> EngineInfo:
        """Wait for the start to end. Raises StartupError if it failed."""
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
        self._command(lambda core: core.abort_request(request_id, choice))

    def stats(self) -> EngineStats | None:
        return self._stats

    def health(self) -> EngineHealth:
        return self._health

    async def reset_prefix_cache(self) -> None:
        """Raises EngineNotReadyError, or EngineDeadError if the engine dies meanwhile."""
        self._require_ready()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._resets.add(done)

        def reset(core: EngineCoreProtocol) -> None:
            core.reset_prefix_cache()
            self._call(partial(_resolve, done))

        self._command(reset)
        try:
            await done
        finally:
            self._resets.discard(done)

    async def close(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._end("the engine is stopped")
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    # --- the engine's thread

    def _run(self) -> None:
        try:
            core = self._core_factory(self._config)
        except Exception as error:
            failure = error if isinstance(error, StartupError) else StartupError(repr(error))
            logger.exception("the engine cannot start")
            self._call(partial(self._on_start_failure, failure))
            return
        self._call(partial(self._on_ready, core.info))
        try:
            while self._obey(core):
                step = core.step()
                self._call(partial(self._on_step, step))
        except Exception:
            logger.exception("the engine loop failed")
            self._call(partial(self._end, "the engine died"))

    def _obey(self, core: EngineCoreProtocol) -> bool:
        """Run the commands that came; wait for some while idle. False once told to stop."""
        while True:
            with self._wake:
                while not (self._commands or core.has_work or self._stopping):
                    self._wake.wait()
                if self._stopping:
                    return False
                commands = list(self._commands)
                self._commands.clear()
            for command in commands:
                command(core)
            if core.has_work:
                return True

    def _call(self, callback: Callable[[], object]) -> None:
        assert self._loop is not None
        # The loop may be gone already when a test ends without close().
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    # --- on the event loop

    def _on_ready(self, info: EngineInfo) -> None:
        if self._stopping:
            return
        self._info = info
        self._health = EngineHealth(True, True, "ready", 0)
        self._settled.set()
        if self._observer is not None:
            self._observer.engine_ready(info)

    def _on_start_failure(self, error: StartupError) -> None:
        self._start_error = error
        self._end(error.message)
        self._settled.set()

    def _on_step(self, step: StepOutput) -> None:
        self._stats = step.stats
        self._streams.deliver(step.outputs)
        if self._observer is not None:
            self._observer.observe_step(step.stats)

    def _end(self, reason: str) -> None:
        self._health = EngineHealth(False, False, reason, 0)
        error = EngineDeadError(reason)
        self._streams.fail_all(error)
        for done in self._resets:
            if not done.done():
                done.set_exception(error)

    def _submit(self, request: Request) -> None:
        def add(core: EngineCoreProtocol) -> None:
            try:
                core.add_request(request)
            except QuireError as error:
                self._call(partial(self._streams.reject, request.request_id, error))

        self._command(add)

    def _command(self, command: Command) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _require_ready(self) -> None:
        if not self._health.ready:
            raise EngineNotReadyError(self._health.reason)


def _resolve(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
