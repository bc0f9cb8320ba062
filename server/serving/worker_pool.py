"""Several HTTP processes on one socket, before one engine: started, told, counted, restarted.

    main process ── socket pair ── HTTP worker 0 ─┐
      engine's     ── socket pair ── HTTP worker 1 ─┴─ unix socket ── engine process
      supervisor

All workers accept from the same listening socket. See ARCHITECTURE.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import sys
import tempfile
import time
from collections import deque
from itertools import count
from pathlib import Path
from typing import Any

import structlog

from ...engine.errors import StartupError
from ...engine.process.process_client import (
    FIRST_DELAY_SECONDS,
    MAX_DELAY_SECONDS,
    STABLE_SECONDS,
    ProcessEngineClient,
)
from ...engine.process.remote_client import EngineStatus
from ..http.limits import LOAD_FIELDS, no_loads
from ..http.worker_link import (
    AskPage,
    AskSamples,
    Drain,
    EngineUpdate,
    Failed,
    Link,
    Page,
    Samples,
    Setup,
    Stop,
    ToMain,
    ToWorker,
    Up,
)
from ..metrics import Metrics
from ..metrics_sum import Sample, Totals, add
from ..settings import Settings

LAST_ANSWERS_SECONDS = 5
"""After the drain, what remains has this long to send its error event."""
END_SECONDS = LAST_ANSWERS_SECONDS + 3
"""A worker that was told to stop is killed after this."""
SAMPLES_SECONDS = 1.0
"""Each worker's counts are taken in this often."""
ANSWER_SECONDS = 3.0
"""A worker that does not say its counts within this time stands in the page with its last ones."""

log = structlog.get_logger(__name__)


class _Worker:
    """One life of a worker."""

    def __init__(
        self, process: asyncio.subprocess.Process, link: Link[ToMain, ToWorker], name: bytes
    ) -> None:
        self.link = link
        self.engine_name = name
        self.up = False
        self.samples: list[Sample] = []
        self._process = process
        self._waiting: deque[asyncio.Future[None]] = deque()
        """One for each question, in the order of the answers: an earlier question's answer may lack
        what was counted before a later one."""

    async def ask_samples(self) -> None:
        """Have `samples` be what it has counted until now, unless it does not answer."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self.link.send(AskSamples())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done, ANSWER_SECONDS)

    def take_samples(self, samples: list[Sample]) -> None:
        self.samples = samples
        self._answer()

    def _answer(self) -> None:
        done = self._waiting.popleft()
        if not done.done():
            done.set_result(None)

    def stop(self) -> None:
        """Let it send its last answers, if it has any."""
        if not self.up:
            return self.kill()
        self.link.send(Stop())
        asyncio.get_running_loop().call_later(END_SECONDS, self.kill)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def end(self) -> int:
        """Its exit code, once its link has ended."""
        try:
            return await asyncio.wait_for(self._process.wait(), END_SECONDS)
        except TimeoutError:
            self.kill()
            return await self._process.wait()
        finally:
            self.link.close()
            while self._waiting:
                self._answer()


class WorkerPool:
    """See `serving.Front`. The engine is supervised by this process and used by the workers."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        engine: ProcessEngineClient,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._count = settings.http_workers
        self._listener = listener
        self._engine = engine
        self._metrics = metrics
        self._created = int(time.time())
        self._workers: dict[int, _Worker] = {}
        self._past: Totals = {}
        """What workers counted that are dead."""
        self._up = asyncio.Event()
        self._draining = False
        self._stopping = asyncio.Event()
        self._pages: set[asyncio.Task[None]] = set()
        self._loads_file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `run`)
        self._loads_file.write(no_loads(self._count))
        self._loads_file.flush()
        self._loads = memoryview(mmap.mmap(self._loads_file.fileno(), 0)).cast("q")
        engine.on_status = self._tell_engine

    # --- Front

    async def run(self) -> None:
        """Raises StartupError where a worker fails before it ever served."""
        with tempfile.TemporaryDirectory(prefix="quire-http-") as folder, self._loads_file:
            tasks = [
                asyncio.create_task(self._keep(index, Path(folder)), name=f"HTTP worker {index}")
                for index in range(self._count)
            ]
            tasks.append(asyncio.create_task(self._take_samples()))
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                self.stop()
                await asyncio.wait(tasks)
            for error in [task.exception() for task in tasks]:
                if error is not None:
                    raise error

    async def wait_up(self) -> None:
        await self._up.wait()

    def begin_drain(self) -> None:
        self._draining = True
        self._send(Drain())

    @property
    def num_unfinished(self) -> int:
        return sum(self._loads[0::LOAD_FIELDS]) + sum(self._loads[1::LOAD_FIELDS])

    def stop(self) -> None:
        if not self._stopping.is_set():
            self._stopping.set()
            for worker in self._workers.values():
                worker.stop()

    # --- the life of a worker

    async def _keep(self, index: int, folder: Path) -> None:
        """Run a worker, and another one in its place whenever it dies."""
        failures = 0
        for life in count():
            began = time.monotonic()
            worker = await self._start(index, life, folder)
            self._workers[index] = worker
            if self._stopping.is_set():
                worker.kill()
            try:
                await self._listen_to(worker)
            finally:
                code = await worker.end()
                self._bury(index)
            if self._stopping.is_set():
                return
            if not worker.up and not life:
                raise StartupError(
                    f"an HTTP worker ended with code {code} while starting; its log says why"
                )
            failures = 1 if time.monotonic() - began > STABLE_SECONDS else failures + 1
            delay = min(FIRST_DELAY_SECONDS * 2 ** (failures - 1), MAX_DELAY_SECONDS)
            log.error("worker_died", worker=index, code=code, restart_in=delay)
            self._metrics.http_worker_restarted()
            if await self._stops_within(delay):
                return

    async def _start(self, index: int, life: int, folder: Path) -> _Worker:
        ours, theirs = socket.socketpair()
        descriptors = (self._listener.fileno(), self._loads_file.fileno(), theirs.fileno())
        # What the environment says of quire is in the settings already.
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith("QUIRE_")
        }
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(
                        sys.executable,
                        "-P",
                        "-m",
                        "quire.server.serving.http_worker",
                        str(theirs.fileno()),
                    ),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=descriptors,
                    env=environment,
                )
            except OSError as error:
                ours.close()
                raise StartupError(f"an HTTP worker cannot be started: {error}") from error
        link: Link[ToMain, ToWorker] = await Link.open(ours, ToMain)
        name = f"http-worker-{index}-{life}".encode()
        link.send(
            Setup(
                settings=self._share(),
                index=index,
                engine_name=name,
                created=self._created,
                folder=str(folder),
                listener=descriptors[0],
                loads=descriptors[1],
            )
        )
        link.send(EngineUpdate(self._engine.status))
        if self._draining:
            link.send(Drain())
        return _Worker(process, link, name)

    def _share(self) -> dict[str, Any]:
        """A worker's settings, with its share of what bounds memory."""
        fields = self._settings.model_dump(mode="json", exclude={"config"})
        for name in ("max_stored_responses", "max_stored_response_bytes"):
            fields[name] = -(-fields[name] // self._count)
        return fields

    async def _listen_to(self, worker: _Worker) -> None:
        """Until its link ends. Raises StartupError where it says that it cannot start."""
        while (message := await worker.link.receive()) is not None:
            match message:
                case Up():
                    worker.up = True
                    if sum(other.up for other in self._workers.values()) == self._count:
                        self._up.set()
                case Samples(samples):
                    worker.take_samples(samples)
                case AskPage():
                    page = asyncio.create_task(self._page(worker))
                    self._pages.add(page)
                    page.add_done_callback(self._pages.discard)
                case Failed(text):
                    raise StartupError(text)

    def _bury(self, index: int) -> None:
        worker = self._workers.pop(index)
        add(self._past, worker.samples)
        begin = index * LOAD_FIELDS
        self._loads[begin : begin + LOAD_FIELDS] = no_loads(1)
        self._engine.client_gone(worker.engine_name)

    async def _stops_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()

    # --- what all are told, and what they count

    def _send(self, message: ToWorker) -> None:
        for worker in self._workers.values():
            worker.link.send(message)

    def _tell_engine(self, status: EngineStatus) -> None:
        self._send(EngineUpdate(status))

    async def _ask_samples(self) -> None:
        asked = [worker.ask_samples() for worker in self._workers.values() if worker.up]
        await asyncio.gather(*asked)

    async def _take_samples(self) -> None:
        """So that little of what a worker counted is lost when it dies."""
        while not await self._stops_within(SAMPLES_SECONDS):
            await self._ask_samples()

    async def _page(self, asking: _Worker) -> None:
        await self._ask_samples()
        totals = dict(self._past)
        for worker in self._workers.values():
            add(totals, worker.samples)
        asking.link.send(Page(*self._metrics.render(totals)))
