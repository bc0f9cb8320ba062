"""Measures what a server adds to its engine: it starts one and sends it requests, for `quire plan
--calibrate`."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import uvloop

from ...engine.errors import StartupError
from ...engine.plan.planned_fleet import PlannedRequest
from ...engine.plan.serving import ServedRun
from .dataset import DatasetOptions, Workload, arrival_times, build_workload
from .load import LoadGenerator, ask
from .measure import make_client

START_SECONDS = 1800.0
"""How long a server may take to start: it loads the model."""
STEPS = re.compile(r"^\w+:iteration_tokens_total_count(?:\{[^}]*\})? (\S+)$", re.M)
PROMPT, LONG_PROMPT, OUTPUT = 128, 400, 16
"""Tokens of prompts and answers, if the context is long enough."""
RUN_SECONDS = 6.0
"""About how long a run takes; it has a number of requests between the bounds."""
MIN_REQUESTS, MAX_REQUESTS = 16, 200
CROWDS = (
    *((1, PROMPT, OUTPUT), (4, PROMPT, OUTPUT)),
    *((16, PROMPT, 2 * OUTPUT), (16, PROMPT, 2), (16, LONG_PROMPT, 2)),
)
"""Requests at once, and their tokens of prompt and answer, in runs that differ in both."""
ALONE_LOAD, LOAD, LOAD_RUNS = 0.5, 0.9, 4
"""Rates of requests that do not meet, and of those that keep the engine busy for a part of the
time, in requests for the time that one takes; and how many runs the latter have."""


class ServedRuns(NamedTuple):
    """The runs that `engine.plan.serving.fit_serving` reads."""

    alone: ServedRun
    crowds: list[ServedRun]
    loads: list[ServedRun]


def measure_server(
    model: str, flags: Mapping[str, Any], progress: Callable[[str], None]
) -> ServedRuns:
    """Start `quire serve` with these flags of the engine, by name, and run requests against it.

    Raises StartupError if it does not start, or if a request fails.
    """
    words = [model, "--speculation", "off", "--log-level", "warning"]
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    with _server(words) as (url, process):
        return uvloop.run(_measure(url, process.pid, progress))


async def _measure(url: str, pid: int, progress: Callable[[str], None]) -> ServedRuns:
    return await ServerRuns(url, pid, progress).measure()


@contextmanager
def _server(flags: list[str]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = ("--host", "127.0.0.1", "--port", str(port))
    command = (sys.executable, "-P", "-m", "quire.server.cli", "serve", *flags, *place)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait()


class ServerRuns:
    """Sends requests to a server whose HTTP process is `pid`, on the same machine."""

    def __init__(self, url: str, pid: int, progress: Callable[[str], None]) -> None:
        self._client = make_client(url)
        self._pid = pid
        self._progress = progress
        self._seed = 0
        self._model, self._longest, self._vocab_size = "", 0, 0

    async def measure(self) -> ServedRuns:
        """Wait until the server is ready, and run everything. Raises StartupError if it ends, or if
        a request fails."""
        try:
            await self._wait_ready()
            self._model, self._longest, self._vocab_size = await self._facts()
            return await self._run_all()
        finally:
            await self._client.close()

    async def _wait_ready(self) -> None:
        """Wait until the server is ready. Raises StartupError if it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                if (await ask(self._client, "/ready")).status == 200:
                    return
            except StartupError:
                _cpu_seconds(self._pid)  # raises if it has ended
            await asyncio.sleep(0.2)
        raise StartupError(f"the server did not start within {START_SECONDS:g} s")

    async def _facts(self) -> tuple[str, int, int]:
        """Return the model's name, its longest context and the size of its vocabulary."""
        models, vocabulary = [
            await ask(self._client, path) for path in ("/v1/models", "/tokenizer_info")
        ]
        if models.status != 200:
            raise StartupError(
                f"the server answers /v1/models with {models.status}: if it wants a key, set "
                "OPENAI_API_KEY"
            )
        model = msgspec.json.decode(models.body)["data"][0]
        size = msgspec.json.decode(vocabulary.body)["vocab_size"]
        return model["id"], model["max_model_len"], size

    async def _run_all(self) -> ServedRuns:
        # 1. Warm up, and see how long one request takes.
        await self._send(8, 2, PROMPT, OUTPUT)
        first = await self._send(10, 1, PROMPT, OUTPUT)
        seconds = sum(first.e2e) / len(first.e2e)

        def count_of(each: float) -> int:
            return max(MIN_REQUESTS, min(MAX_REQUESTS, int(RUN_SECONDS / each)))

        # 2. Requests that do not meet.
        count = min(count_of(seconds / ALONE_LOAD), 60)
        gaps = [i * seconds / ALONE_LOAD for i in range(count)]
        alone = await self._send(count, None, PROMPT, OUTPUT, gaps)
        # 3. Loads, before machines that give only short bursts of their processors slow down.
        loads = []
        for _ in range(LOAD_RUNS):
            count = count_of(2 * seconds / LOAD)
            arrivals = arrival_times(count, LOAD / seconds, 1.0, self._seed)
            loads.append(await self._send(count, None, PROMPT, 2 * OUTPUT, arrivals))
        # 4. Crowds, of which only the seconds of processors count.
        crowds = [
            await self._send(count_of(seconds / min(width, 2)), width, prompt, output)
            for width, prompt, output in CROWDS
        ]
        return ServedRuns(alone, crowds, loads)

    async def _send(
        self,
        count: int,
        width: int | None,
        prompt_len: int,
        output_len: int,
        arrivals: list[float] | None = None,
    ) -> ServedRun:
        """Send requests with prompts that no other run has: `width` at once, or at their times."""
        self._seed += 1
        self._progress(f"HTTP: {count} requests of {prompt_len} and {output_len} tokens")
        workload = self._workload(count, prompt_len, output_len)
        generator = LoadGenerator(
            self._client,
            "/v1/completions",
            self._model,
            n=1,
            fields={"temperature": 0.0, "ignore_eos": True},
            timeout=1200.0,
            max_concurrency=width,
        )
        times = arrivals or [0.0] * count
        steps, cpu = await self._num_steps(), _cpu_seconds(self._pid)
        run = await generator.run(workload, times, "")
        cpu = _cpu_seconds(self._pid) - cpu
        steps = await self._num_steps() - steps
        failed = [one for one in run.records if one.error is not None]
        if failed:
            raise StartupError(f"a request failed: {failed[0].error}: {failed[0].error_message}")
        return ServedRun(
            requests=[
                PlannedRequest(at, one.prompt, one.output_len)  # type: ignore[arg-type]
                for at, one in zip(times, workload.requests, strict=True)
            ],
            ttft=[one.ttft or 0.0 for one in run.records],
            e2e=[one.e2e or 0.0 for one in run.records],
            num_steps=steps,
            http_seconds=cpu,
            client_seconds=run.client.cpu_share * run.duration_s,
        )

    def _workload(self, count: int, prompt_len: int, output_len: int) -> Workload:
        return build_workload(
            DatasetOptions(
                name="random",
                num_prompts=count,
                input_len=min(prompt_len, self._longest // 2),
                output_len=min(output_len, self._longest // 4),
                vocab_size=self._vocab_size,
                seed=self._seed,
            )
        )

    async def _num_steps(self) -> int:
        answer = await ask(self._client, "/metrics")
        return sum(int(float(one)) for one in STEPS.findall(answer.body.decode()))


def _cpu_seconds(pid: int) -> float:
    """Return the seconds of processors that a process has used, on Linux. Raises StartupError if
    there is no such process."""
    # The clock of another process, as clock_getcpuclockid(3) makes it.
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError as error:
        raise StartupError("the server has ended; its log above says why") from error
