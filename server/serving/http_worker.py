"""One of several HTTP processes, started by the pool.

    python -P -m quire.server.serving.http_worker FD

It serves the whole application on the socket that all workers share, with an engine that the main
process supervises. FD is its end of the link to the main process. It ends when the main process
tells it to, or when the main process itself ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from ...engine.errors import StartupError
from ...engine.fleet.directory import AttachedEngines
from ...engine.fleet.fleet_client import FleetClient
from ...engine.process.attached_client import AttachedEngineClient
from ...engine.process.engine_process import die_with_parent
from ...engine.process.heap import settle
from ..http import worker_link
from ..http.siblings import Siblings
from ..http.worker_link import Link, ToMain, ToWorker
from ..logs import configure_logging, resolve_format
from ..metrics.metrics import Metrics
from ..settings import Settings
from ..tenants.rates import Rates
from .http_server import build_app, make_metrics, routing_counter, uvicorn_server
from .shared_counters import SharedCounters

if TYPE_CHECKING:
    from ..requests.state import ServerState

Pages = deque[asyncio.Future[tuple[bytes, str]]]
"""Pages of metrics that were asked for, in the order in which they will come."""


def main() -> int:
    """Serve until told to stop, then return 0; return 1 if the start failed."""
    die_with_parent()
    # A signal to the process group is meant for the main process, which decides when to stop.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end = socket.socket(fileno=int(sys.argv[1]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(end))


async def _run(end: socket.socket) -> int:
    link: Link[ToWorker, ToMain] = await Link.open(end, ToWorker)
    setup = await link.receive()
    if not isinstance(setup, worker_link.Setup):
        return 1
    settings = Settings(**setup.settings)
    configure_logging(settings.log_level, resolve_format(settings.log_format), setup.index)
    metrics = make_metrics(settings)
    engine, links = _make_engine(settings, setup.engine_name, metrics)
    siblings = _siblings(setup, settings.http_workers)
    try:
        app = await asyncio.to_thread(build_app, settings, engine, metrics, siblings)
    except StartupError as error:
        link.send(worker_link.Failed(error.message))
        await link.drain()
        return 1
    state: ServerState = app.state.quire
    state.created = setup.created
    pages: Pages = deque()

    async def page_of_all(openmetrics: bool) -> tuple[bytes, str]:
        page: asyncio.Future[tuple[bytes, str]] = asyncio.get_running_loop().create_future()
        pages.append(page)
        link.send(worker_link.AskPage())
        return await page

    state.render_metrics = page_of_all
    server = uvicorn_server(settings, app)
    listener = socket.socket(fileno=setup.listener)
    await siblings.listen(app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    obeying = asyncio.create_task(_obey(link, state, links, metrics, pages))
    broken = [asyncio.create_task(one.broken.wait()) for one in links]
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    settle()
    link.send(worker_link.Up())
    await asyncio.wait({serving, obeying, *broken}, return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, obeying):
        if task.done():
            task.result()
    if not obeying.done():
        os._exit(1)  # the link to the engine is broken: the pool starts another worker in its place
    server.should_exit = True
    await serving
    siblings.close()
    return 0


def _siblings(setup: worker_link.Setup, processes: int) -> Siblings:
    """Return this worker's place among `processes` workers, with the memory that they share."""
    counters = SharedCounters.open(setup.counters, processes)
    rates = Rates(counters.rates, setup.index)
    return Siblings(setup.index, counters.loads, Path(setup.folder), rates, setup.tenants)


def _make_engine(
    settings: Settings, name: bytes, metrics: Metrics
) -> tuple[FleetClient | AttachedEngineClient, list[AttachedEngineClient]]:
    """Return the client of the engine, or of all of them, and its links to them."""
    count = settings.data_parallel_size
    if count == 1:
        link = AttachedEngineClient(name, observer=metrics)
        return link, [link]
    engines = AttachedEngines(count, name, lambda engine: metrics)
    counter = routing_counter(metrics)
    return FleetClient(engines, name=name.decode(), on_routed=counter), engines.links


async def _obey(
    link: Link[ToWorker, ToMain],
    state: ServerState,
    engines: list[AttachedEngineClient],
    metrics: Metrics,
    pages: Pages,
) -> None:
    """Follow the main process's messages, until one says to stop."""
    while (message := await link.receive()) is not None:
        match message:
            case worker_link.EngineUpdate(status, index):
                engines[index].follow(status)
            case worker_link.KeysUpdate(tenants):
                state.keys.ring.replace(tenants)
            case worker_link.AskSamples():
                link.send(worker_link.Samples(metrics.samples()))
            case worker_link.Page(content, media_type):
                page = pages.popleft()
                if not page.done():
                    page.set_result((content, media_type))
            case worker_link.Drain():
                state.begin_drain()
            case worker_link.Stop():
                return
    os._exit(1)  # the main process has died


if __name__ == "__main__":
    sys.exit(main())
