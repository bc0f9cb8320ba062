"""One of several HTTP processes.

The pool starts it as `python -P -m quire.server.serving.http_worker FD`.

It serves the whole application on the socket that all share, with an engine that the main process
supervises. It ends when the main process says so, or ends itself.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import socket
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from ...engine.errors import StartupError
from ...engine.process.attached_client import AttachedEngineClient
from ...engine.process.engine_process import die_with_parent
from ...engine.process.heap import settle
from ..http.siblings import Siblings
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
from ..logs import configure_logging, resolve_format
from ..metrics import Metrics
from ..settings import Settings
from .main import build_app, uvicorn_server

if TYPE_CHECKING:
    from ..requests.state import ServerState

Pages = deque[asyncio.Future[tuple[bytes, str]]]


def main() -> int:
    """Exit code 0 when told to stop."""
    die_with_parent()
    # Whoever signals the process group means the main process, which decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end = socket.socket(fileno=int(sys.argv[1]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(end))


async def _run(end: socket.socket) -> int:
    link: Link[ToWorker, ToMain] = await Link.open(end, ToWorker)
    setup = await link.receive()
    if not isinstance(setup, Setup):
        return 1
    settings = Settings(**setup.settings)
    configure_logging(settings.log_level, resolve_format(settings.log_format), setup.index)
    metrics = Metrics(settings.served_names[0], settings.metrics_prefix)
    engine = AttachedEngineClient(setup.engine_name, observer=metrics)
    loads = memoryview(mmap.mmap(setup.loads, 0)).cast("q")
    siblings = Siblings(setup.index, loads, Path(setup.folder))
    try:
        app = await asyncio.to_thread(build_app, settings, engine, metrics, siblings)
    except StartupError as error:
        link.send(Failed(error.message))
        await link.drain()
        return 1
    state: ServerState = app.state.quire
    state.created = setup.created
    pages: Pages = deque()

    async def page_of_all() -> tuple[bytes, str]:
        page: asyncio.Future[tuple[bytes, str]] = asyncio.get_running_loop().create_future()
        pages.append(page)
        link.send(AskPage())
        return await page

    state.render_metrics = page_of_all  # type: ignore[method-assign]
    server = uvicorn_server(settings, app)
    listener = socket.socket(fileno=setup.listener)
    await siblings.listen(app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    obeying = asyncio.create_task(_obey(link, state, engine, metrics, pages))
    broken = asyncio.create_task(engine.broken.wait())
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    settle()
    link.send(Up())
    await asyncio.wait({serving, obeying, broken}, return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, obeying):
        if task.done():
            task.result()
    if not obeying.done():
        os._exit(1)  # of no use any more: another takes its place
    server.should_exit = True
    await serving
    siblings.close()
    return 0


async def _obey(
    link: Link[ToWorker, ToMain],
    state: ServerState,
    engine: AttachedEngineClient,
    metrics: Metrics,
    pages: Pages,
) -> None:
    """Do what the main process says, until it says to stop."""
    while (message := await link.receive()) is not None:
        match message:
            case EngineUpdate(status):
                engine.follow(status)
            case AskSamples():
                link.send(Samples(metrics.samples()))
            case Page(content, media_type):
                page = pages.popleft()
                if not page.done():
                    page.set_result((content, media_type))
            case Drain():
                state.begin_drain()
            case Stop():
                return
    os._exit(1)  # the main process has died


if __name__ == "__main__":
    sys.exit(main())
