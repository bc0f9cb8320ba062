"""Sends the requests of a run at their times and records the answers."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import msgspec
from tqdm import tqdm

from ...engine.errors import StartupError
from .dataset import BenchRequest, Endpoint, Workload
from .report import DRAFT_COUNTERS, ClientLoad, RunRecords
from .stream import RequestError, RequestRecord, StreamReader, error_of

if TYPE_CHECKING:
    from .http import HttpAnswer, HttpClient

COUNTERS = (
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    *DRAFT_COUNTERS,
)
"""Counters of the server that a run reports, by the end of their names in vLLM."""
_LAG_PERIOD = 0.05
"""Seconds between two measurements of the event loop's lag."""
_ASK_TIMEOUT = 30.0
"""Seconds that the server may take to answer a question about itself."""


class LoadGenerator:
    """Sends requests to one endpoint of one server.

    Every body has the `fields`. `n` is the number of choices per request, and `timeout` the maximum
    seconds per request. At most `max_concurrency` requests run at once; None is no limit.
    """

    def __init__(
        self,
        client: HttpClient,
        endpoint: Endpoint,
        model: str,
        *,
        n: int,
        fields: dict[str, Any],
        timeout: float,
        max_concurrency: int | None,
    ) -> None:
        self._client = client
        self._endpoint = endpoint
        self._fields = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"n": n} if n > 1 else {}),
            **fields,
        }
        self._n = n
        self._timeout = timeout
        self._max_concurrency = max_concurrency

    async def run(self, workload: Workload, arrivals: list[float], title: str) -> RunRecords:
        """Send all requests and return their records.

        Each is sent at its arrival time, in seconds from now, or as soon as a running request ends
        if max_concurrency are running. `title` labels the progress bar.
        """
        before = await self._counters()
        slots = asyncio.Semaphore(self._max_concurrency) if self._max_concurrency else None
        active = peak = 0
        bar = tqdm(total=len(workload.requests), desc=title, unit="req", disable=None)
        lag = _LagMonitor()
        cpu, begin = time.process_time(), time.perf_counter()

        async def send(request: BenchRequest, arrival: float) -> RequestRecord:
            nonlocal active, peak
            await asyncio.sleep(begin + arrival - time.perf_counter())
            async with slots or nullcontext():
                active += 1
                peak = max(peak, active)
                record = await self.send(request, begin)
                active -= 1
            bar.update()
            return record

        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(lag.watch())
                tasks = [
                    group.create_task(send(request, arrival))
                    for request, arrival in zip(workload.requests, arrivals, strict=True)
                ]
                records = list(await asyncio.gather(*tasks))
                watch.cancel()
        finally:
            bar.close()
        seconds = time.perf_counter() - begin
        load = ClientLoad(
            cpu_share=(time.process_time() - cpu) / seconds, max_lag_ms=lag.longest * 1e3
        )
        after = await self._counters()
        return RunRecords(
            records=records,
            duration_s=seconds,
            peak_concurrency=peak,
            client=load,
            server={name: after[name] - before[name] for name in after if name in before},
        )

    async def send(self, request: BenchRequest, run_begin: float) -> RequestRecord:
        """Send one request and return its record; a failure becomes the record's error."""
        body = msgspec.json.encode(self._body(request))
        begin = time.perf_counter()
        record = RequestRecord(
            start=begin - run_begin,
            requested_output_tokens=request.output_len,
            num_choices=self._n,
        )
        reader = StreamReader(record, begin)
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._client.request("POST", self._endpoint, body, reader.feed)
            if answer.status != 200:
                raise _refusal(answer)
            reader.finish()
        except RequestError as error:
            record.error, record.error_message = error.kind, str(error)
        except TimeoutError:
            record.error, record.error_message = "timeout", f"over {self._timeout:g} s"
        return record

    def _body(self, request: BenchRequest) -> dict[str, Any]:
        if self._endpoint == "/v1/completions":
            return {
                **self._fields,
                "prompt": request.prompt,
                "max_tokens": request.output_len,
            }
        return {
            **self._fields,
            "messages": [{"role": "user", "content": request.prompt}],
            "max_completion_tokens": request.output_len,
        }

    async def _counters(self) -> dict[str, float]:
        """Return the server's counters by their names in vLLM; empty if it has none of them."""
        answer = await ask(self._client, "/metrics")
        return (
            parse_counters(answer.body.decode("utf-8", "replace")) if answer.status == 200 else {}
        )


async def ask(client: HttpClient, path: str) -> HttpAnswer:
    """GET a page on which the server describes itself. Raises StartupError without an answer."""
    try:
        async with asyncio.timeout(_ASK_TIMEOUT):
            return await client.request("GET", path)
    except TimeoutError as error:
        raise StartupError(f"the server did not answer within {_ASK_TIMEOUT:g} s") from error
    except RequestError as error:
        raise StartupError(f"the server does not answer: {error}") from error


class _LagMonitor:
    """Measures how late the event loop wakes, which bounds the error of any time stamp."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        """Measure until cancelled; `longest` is the largest lag in seconds."""
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(_LAG_PERIOD)
            self.longest = max(self.longest, time.perf_counter() - begin - _LAG_PERIOD)


def parse_counters(text: str) -> dict[str, float]:
    """Read COUNTERS from Prometheus' text format: with any prefix, summed over their labels."""
    found: dict[str, float] = {}
    names = "|".join(COUNTERS)
    pattern = rf"^\w+:({names})_total(?:\{{.*\}})? (\S+)"
    for name, value in re.findall(pattern, text, re.M):
        found[name] = found.get(name, 0.0) + float(value)
    return {name: found[name] for name in COUNTERS if name in found}


def _refusal(answer: HttpAnswer) -> RequestError:
    message = answer.body[:300].decode("utf-8", "replace")
    with suppress(msgspec.DecodeError, AttributeError):
        message = str(error_of(msgspec.json.decode(answer.body).get("error"), "")) or message
    return RequestError(f"http_{answer.status}", message)
