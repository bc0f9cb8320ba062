"""Several HTTP processes on one socket, in front of one engine: start, inform, count, restart.

    main process ── socket pair ── HTTP worker 0 ─┐
      engine's     ── socket pair ── HTTP worker 1 ─┴─ unix socket ── engine process
      supervisor

All workers accept from the same listening socket. See ARCHITECTURE.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import structlog

from ...engine.errors import StartupError
from ...engine.fleet.fleet_client import FleetClient
from ...engine.process.private_folder import private_folder
from ...engine.process.process_client import (
    FIRST_DELAY_SECONDS,
    MAX_DELAY_SECONDS,
    STABLE_SECONDS,
    ProcessEngineClient,
)
from ...engine.process.remote_client import EngineStatus
from ..http import worker_link
from ..http.limits import LOAD_FIELDS, no_loads
from ..http.worker_link import ToWorker
from ..metrics.metrics import Metrics
from ..metrics.metrics_sum import Totals, add
from ..settings import Settings
from ..tenants.key_metrics import KeyMetrics
from ..tenants.key_ring import KeySource
from ..tenants.rates import Rates
from ..tenants.tenant import Tenant
from . import shared_counters
from .pool_worker import PoolWorker
from .shared_counters import SharedCounters

SAMPLES_SECONDS = 1.0
"""Seconds between two collections of each worker's counts."""
MAX_SILENCE = 5
"""Collections in a row, of up to four seconds each, after which a silent worker is killed."""

log = structlog.get_logger(__name__)


class WorkerPool:
    """The Front (serving/main.py) of several HTTP processes.

    This process supervises the engine, and the workers use it.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        engine: ProcessEngineClient | FleetClient,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._count = settings.http_workers
        self._listener = listener
        self._engines = engine.supervised if isinstance(engine, FleetClient) else [engine]
        self._metrics = metrics
        self._created = int(time.time())
        self._workers: dict[int, PoolWorker] = {}
        self._past: Totals = {}
        """The counts of workers that have died."""
        self._up = asyncio.Event()
        self._draining = False
        self._stopping = asyncio.Event()
        self._pages: set[asyncio.Task[None]] = set()
        self._counters = shared_counters.create(self._count)  # closed by `run`
        self._loads, rates = SharedCounters.open(self._counters, self._count)
        self._rates = Rates(rates)
        self._key_source = KeySource(settings)
        KeyMetrics(metrics)  # the page has the families that this process knows
        for index, one in enumerate(self._engines):
            one.on_status = partial(self._tell_engine, index)

    # --- The methods of Front

    async def run(self) -> None:
        """Serve until `stop`. Raises StartupError if a worker fails in its first life."""
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(private_folder())
            except OSError as problem:
                reason = problem.strerror or str(problem)
                raise StartupError(f"the HTTP workers cannot be started: {reason}") from problem
            tasks = [
                asyncio.create_task(self._keep(index, folder), name=f"HTTP worker {index}")
                for index in range(self._count)
            ]
            tasks.append(asyncio.create_task(self._take_samples()))
            watching = asyncio.create_task(self._key_source.watch(self._tell_keys))
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                self.stop()
                watching.cancel()
                await asyncio.wait([*tasks, watching])
                os.close(self._counters)
            for error in [task.exception() for task in tasks]:
                if error is not None:
                    raise error

    async def wait_up(self) -> None:
        """Return once every worker accepts connections."""
        await self._up.wait()

    def begin_drain(self) -> None:
        """Tell all workers, and those started from now on, to refuse new requests."""
        self._draining = True
        self._send(worker_link.Drain())

    @property
    def num_unfinished(self) -> int:
        """The number of choices that clients of all workers still wait for."""
        return sum(self._loads[0::LOAD_FIELDS]) + sum(self._loads[1::LOAD_FIELDS])

    def stop(self) -> None:
        """Tell all workers to end, and start no more."""
        if not self._stopping.is_set():
            self._stopping.set()
            for worker in self._workers.values():
                worker.stop()

    # --- The life of a worker

    async def _keep(self, index: int, folder: Path) -> None:
        """Run a worker, and start another in its place whenever it dies."""
        failures = 0
        for life in count():
            began = time.monotonic()
            code = None
            try:
                code = await self._live(index, life, folder)
            except (StartupError, OSError) as error:
                if not life:
                    raise
                # What was enough for the first one will be again.
                log.error("worker_failed", worker=index, error=str(error))
            if self._stopping.is_set():
                return
            failures = 1 if time.monotonic() - began > STABLE_SECONDS else failures + 1
            delay = min(FIRST_DELAY_SECONDS * 2 ** (failures - 1), MAX_DELAY_SECONDS)
            log.error("worker_died", worker=index, code=code, restart_in=delay)
            self._metrics.http_worker_restarted()
            if await self._stops_within(delay):
                return

    async def _live(self, index: int, life: int, folder: Path) -> int:
        """Run a worker to its end, and return its exit code. Raises StartupError if it cannot be
        started or reports that it cannot start, and OSError."""
        worker = await self._start(index, life, folder)
        self._workers[index] = worker
        if self._stopping.is_set():
            worker.kill()
        try:
            await self._listen_to(worker)
        finally:
            code = await worker.end()
            self._bury(index)
        if not (worker.up or life or self._stopping.is_set()):
            raise StartupError(
                f"an HTTP worker ended with code {code} while starting; its log says why"
            )
        return code

    async def _start(self, index: int, life: int, folder: Path) -> PoolWorker:
        worker = await PoolWorker.start(
            worker_link.Setup(
                settings=self._share(),
                index=index,
                engine_name=f"http-worker-{index}-{life}".encode(),
                created=self._created,
                folder=str(folder),
                listener=self._listener.fileno(),
                counters=self._counters,
                tenants=list(self._key_source.tenants),
            )
        )
        for number, one in enumerate(self._engines):
            worker.link.send(worker_link.EngineUpdate(one.status, number))
        if self._draining:
            worker.link.send(worker_link.Drain())
        return worker

    def _share(self) -> dict[str, Any]:
        """Return a worker's settings, with its share of the limits on memory."""
        fields = self._settings.model_dump(mode="json", exclude={"config"})
        for name in ("max_stored_responses", "max_stored_response_bytes"):
            fields[name] = -(-fields[name] // self._count)
        return fields

    async def _listen_to(self, worker: PoolWorker) -> None:
        """Handle the worker's messages until its link ends.

        Raises StartupError if the worker reports that it cannot start.
        """
        while (message := await worker.link.receive()) is not None:
            match message:
                case worker_link.Up():
                    worker.up = True
                    if sum(other.up for other in self._workers.values()) == self._count:
                        self._up.set()
                case worker_link.Samples(samples):
                    worker.take_samples(samples)
                case worker_link.AskPage():
                    page = asyncio.create_task(self._page(worker))
                    self._pages.add(page)
                    page.add_done_callback(self._pages.discard)
                case worker_link.Failed(text):
                    raise StartupError(text)

    def _bury(self, index: int) -> None:
        worker = self._workers.pop(index)
        add(self._past, worker.samples)
        begin = index * LOAD_FIELDS
        self._loads[begin : begin + LOAD_FIELDS] = no_loads(1)
        self._rates.forget_running(index)
        for one in self._engines:
            one.client_gone(worker.engine_name)

    async def _stops_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()

    # --- Messages to all workers, and their counts

    def _send(self, message: ToWorker) -> None:
        for worker in self._workers.values():
            worker.link.send(message)

    def _tell_engine(self, index: int, status: EngineStatus) -> None:
        self._send(worker_link.EngineUpdate(status, index))

    def _tell_keys(self, tenants: Sequence[Tenant]) -> None:
        self._send(worker_link.KeysUpdate(list(tenants)))

    async def _ask_samples(self) -> None:
        asked = [worker.ask_samples() for worker in self._workers.values() if worker.up]
        await asyncio.gather(*asked)

    async def _take_samples(self) -> None:
        """Collect the counts regularly, so that few of them are lost when a worker dies.

        A worker that does not answer for long hangs, or was stopped: it is killed, and another
        takes its place. (Silence is counted in questions, so that nobody is to blame for the time
        for which this process itself was stopped.)
        """
        while not await self._stops_within(SAMPLES_SECONDS):
            await self._ask_samples()
            for worker in self._workers.values():
                if worker.silence >= MAX_SILENCE and not self._stopping.is_set():
                    log.error("worker_silent", name=worker.engine_name.decode())
                    worker.kill()

    async def _page(self, asking: PoolWorker) -> None:
        await self._ask_samples()
        totals = dict(self._past)
        for worker in self._workers.values():
            add(totals, worker.samples)
        self._metrics.engine_health(any(one.health().ready for one in self._engines))
        asking.link.send(worker_link.Page(*self._metrics.render(totals)))
