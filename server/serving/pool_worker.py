"""One HTTP worker process as the main process sees it: its start, its link and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections import deque

from ...engine.errors import StartupError
from ..http.worker_link import AskSamples, Link, Setup, Stop, ToMain, ToWorker
from ..metrics.metrics_sum import Sample
from .http_server import LAST_ANSWERS_SECONDS

END_SECONDS = LAST_ANSWERS_SECONDS + 3
"""Seconds after which a worker that was told to stop is killed."""
ANSWER_SECONDS = 3.0
"""Seconds that a worker may take to send its counts. After that its last counts are used."""


class PoolWorker:
    """One worker process, from its start to its death.

    `up` is True once it accepts connections. `samples` are the counts that it last sent.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, link: Link[ToMain, ToWorker], name: bytes
    ) -> None:
        self.link = link
        self.engine_name = name
        self.up = False
        self.samples: list[Sample] = []
        self.silence = 0
        """Questions in a row that the worker did not answer in time."""
        self._process = process
        self._waiting: deque[asyncio.Future[None]] = deque()
        """One future for each question. Answers come in the order of the questions, and the answer
        to an earlier question may lack what was counted before a later one was asked."""

    @classmethod
    async def start(cls, setup: Setup) -> PoolWorker:
        """Start a worker, which inherits the descriptors of `setup`. Raises StartupError."""
        ours, theirs = socket.socketpair()
        # The settings that the worker is sent already include those of the environment.
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith("QUIRE_")
        }
        with theirs:
            end = theirs.fileno()
            command = ("-P", "-m", "quire.server.serving.http_worker", str(end))
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(setup.listener, setup.counters, end),
                    env=environment,
                )
            except OSError as error:
                ours.close()
                raise StartupError(f"an HTTP worker cannot be started: {error}") from error
        link: Link[ToMain, ToWorker] = await Link.open(ours, ToMain)
        link.send(setup)
        return cls(process, link, setup.engine_name)

    async def ask_samples(self) -> None:
        """Bring `samples` up to date, unless the worker does not answer in time."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self.link.send(AskSamples())
        self.silence += 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done, ANSWER_SECONDS)

    def take_samples(self, samples: list[Sample]) -> None:
        """Store the worker's answer to the oldest open question."""
        self.samples = samples
        self.silence = 0
        self._answer()

    def _answer(self) -> None:
        done = self._waiting.popleft()
        if not done.done():
            done.set_result(None)

    def stop(self) -> None:
        """Tell the worker to send its last answers and end; kill it if it never came up."""
        if not self.up:
            return self.kill()
        self.link.send(Stop())
        asyncio.get_running_loop().call_later(END_SECONDS, self.kill)

    def kill(self) -> None:
        """End the process at once, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def end(self) -> int:
        """Wait for the process, whose link has ended, and return its exit code."""
        try:
            return await asyncio.wait_for(self._process.wait(), END_SECONDS)
        except TimeoutError:
            self.kill()
            return await self._process.wait()
        finally:
            self.link.close()
            while self._waiting:
                self._answer()
