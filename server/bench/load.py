"""Sends the requests of a benchmark at their times and records what comes back."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import nullcontext, suppress
from typing import Any

import h11
import msgspec
from tqdm import tqdm

from ...engine.errors import StartupError
from .dataset import BenchRequest, Endpoint, Workload
from .http import ConnectionLost, HttpAnswer, HttpClient
from .report import ClientLoad, RunRecords
from .stream import RequestError, RequestRecord, StreamReader, error_of

COUNTERS = ("num_preemptions", "prefix_cache_queries", "prefix_cache_hits")
_LAG_PERIOD = 0.05  # seconds
_ASK_TIMEOUT = 30.0


class LoadGenerator:
    """One server, one endpoint, one way to ask. `timeout` is in seconds for a whole request;
    `fields` go into every body."""

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
        """All requests, each sent at its arrival (seconds from now) or, where max_concurrency are
        under way, as soon as one ends."""
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
        """One request from sending to its end; failures become the record's error."""
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
        except ConnectionLost as error:
            record.error, record.error_message = "connection_lost", str(error)
        except OSError as error:
            record.error, record.error_message = "connection_failed", str(error)
        except h11.RemoteProtocolError as error:
            record.error, record.error_message = "bad_http", str(error)
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
        """The server's counters of what it did, under vLLM's names; none where it has no such."""
        answer = await ask(self._client, "/metrics")
        return (
            parse_counters(answer.body.decode("utf-8", "replace")) if answer.status == 200 else {}
        )


async def ask(client: HttpClient, path: str) -> HttpAnswer:
    """GET what the server tells of itself. Raises StartupError where it does not answer."""
    try:
        async with asyncio.timeout(_ASK_TIMEOUT):
            return await client.request("GET", path)
    except TimeoutError as error:
        raise StartupError(f"the server did not answer within {_ASK_TIMEOUT:g} s") from error
    except (OSError, ConnectionLost, h11.RemoteProtocolError) as error:
        raise StartupError(f"the server does not answer: {error}") from error


class _LagMonitor:
    """How late the event loop wakes: what any timestamp may be off by."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(_LAG_PERIOD)
            self.longest = max(self.longest, time.perf_counter() - begin - _LAG_PERIOD)


def parse_counters(text: str) -> dict[str, float]:
    """Of Prometheus' text format: COUNTERS, summed over their labels, whatever their prefix."""
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
