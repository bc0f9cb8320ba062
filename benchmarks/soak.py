"""Let a real server run under mixed load and faults for a while, and check that nobody is harmed.

    python -P benchmarks/soak.py [--minutes 60] [--http-workers 2] [--json soak.json]

Clients ask without a pause: chats, completions, responses and messages, streamed and whole, several
choices, grammars, beams. Meanwhile 10% of the clients disconnect, 5% send what must be refused,
some read slowly, bursts of requests exceed the queue, and the engine and HTTP workers are killed.
Every greedy answer must be what the same request got when it was alone, and every stream must end
once. Errors are allowed only within a window around a kill (an engine's lasts until the server is
ready again), and 429 only for the queue. Now and then all clients pause: then no block may be held.
The memory of each process must not grow by a megabyte a minute. Exits with code 1 if anything is
wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

QUEUE = 24
"""Requests that may wait before new ones get 429."""
BLOCKS = 96
"""Blocks of the pool: few, so that sequences are preempted."""
READY_IN_A_ROW = 10
"""Answers of /ready, on connections of their own, after which all HTTP workers count as ready."""
MAX_SLOPE = 1.0
"""Megabytes a minute by which a process may grow."""
WARM_SECONDS, MEASURED_SECONDS = 120.0, 480.0
"""A process's memory is fitted from so many seconds after its start, over at least so many: until
then it fills its caches, which is no leak."""
WORDS = ("What is a KV block?", "How are requests scheduled?", "Say something about slots.",
         "Why is memory divided into blocks?", "What does a step do?")  # fmt: skip
CODES = {"rate_limit_error": "queue_full", "overloaded_error": "engine_not_ready"}
"""The codes of the types that Anthropic's API has instead."""
IN_WINDOW = {"engine_dead", "engine_not_ready", "api_error", "connection"}
"""How requests may fail within a window."""


def healthy_requests() -> list[tuple[str, dict[str, Any]]]:
    """Return paths and bodies of greedy requests of many kinds."""
    requests: list[tuple[str, dict[str, Any]]] = []
    for number, words in enumerate(WORDS):
        chat = [{"role": "user", "content": words}]
        greedy = {"temperature": 0, "max_tokens": 24 + 12 * number}
        for stream in (False, True):
            requests += [
                ("/v1/completions", {"prompt": words, "stream": stream, **greedy}),
                ("/v1/chat/completions", {"messages": chat, "stream": stream, **greedy}),
                ("/v1/chat/completions", {"messages": chat, "stream": stream, "n": 2, **greedy}),
                ("/v1/messages", {"messages": chat, "stream": stream, **greedy}),
            ]
        long = "the same long beginning of many prompts; " * 12 + words
        requests += [
            ("/v1/completions", {"prompt": long, "stream": True, **greedy}),
            ("/v1/responses", {"input": words, "temperature": 0, "max_output_tokens": 24}),
            (
                "/v1/chat/completions",
                {"messages": chat, **greedy, "response_format": {"type": "json_object"}},
            ),
            (
                "/v1/completions",
                {"prompt": words, "use_beam_search": True, "n": 2, **greedy, "max_tokens": 8},
            ),
        ]
    return requests


BAD: list[tuple[str, Any, int]] = [
    ("/v1/completions", b'{"prompt": ', 400),
    ("/v1/completions", {"prompt": "a", "temperature": 9}, 400),
    ("/v1/completions", {"prompt": "a", "n": 0}, 400),
    ("/v1/completions", {"prompt": "a", "model": "nobody"}, 404),
    ("/v1/completions", {"prompt": "a", "max_tokens": 10**9}, 400),
    ("/v1/completions", {"prompt": [10**8]}, 400),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_p": 0}, 400),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "("}}, 400),
    ("/v1/nothing", {"prompt": "a"}, 404),
    ("/tokenize", {}, 400),
]


@dataclass
class Outcome:
    """What one request got. `code` is that of an error, or None."""

    text: str = ""
    code: str | None = None
    ends: int = 0
    """Terminal events: one for each choice, and the stream's own."""
    expected_ends: int = 0


@dataclass
class Totals:
    """Counters of a run, and what went wrong."""

    requests: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Soak:
    """One server and its clients."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._rng = random.Random(options.seed)
        self.totals = Totals()
        self._requests = healthy_requests()
        self._expected: list[str] = []
        self._windows: list[list[float]] = []
        """From each kill until everything is ready again."""
        self._open = asyncio.Event()
        self._busy = 0
        self._samples: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
        self._end = 0.0

    async def run(self) -> None:
        """Start the server, soak it, and stop it."""
        options = self._options
        self._server = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "quire.server.cli", "serve", *options.model),
            *("--port", "0", "--log-format", "json", "--num-gpu-blocks-override", str(BLOCKS)),
            *("--max-num-seqs", "8", "--max-num-queued-reqs", str(QUEUE)),
            *("--http-workers", str(options.http_workers), "--max-model-len", "512"),
            *("--engine-stall-timeout", "30"),
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "QUIRE_ADMIN_API_KEY": "soak"},
        )
        address = await self._read_address()
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
        headers = {"authorization": "Bearer soak"}
        async with httpx.AsyncClient(
            base_url=address, timeout=120, limits=limits, headers=headers
        ) as self._http:
            for path, body in self._requests:
                outcome = await self._ask(path, body)
                if outcome.code is not None:
                    raise SystemExit(f"{path} {body} fails alone: {outcome.code}")
                self._expected.append(outcome.text)
            self._end = time.monotonic() + 60 * options.minutes
            self._open.set()
            faults = [self._kill_engines(), self._kill_workers(), self._burst(), self._rest()]
            clients = [self._client() for _ in range(options.clients)]
            await asyncio.gather(*clients, *faults)
            await self._check_idle()
        self._server.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(self._server.wait(), 60)
        if code != 0:
            self.totals.wrong.append(f"the server ended with code {code}")

    async def _read_address(self) -> str:
        assert self._server.stderr is not None
        address = ""
        log = Path(self._options.log).open("wb")  # noqa: SIM115 – it is written to the end
        while not address:
            line = await self._server.stderr.readline()
            log.write(line)
            if not line:
                raise SystemExit(f"the server did not start: see {self._options.log}")
            with suppress(ValueError):
                event = json.loads(line)
                address = event.get("address", "") if event.get("event") == "ready" else ""

        async def drain() -> None:
            assert self._server.stderr is not None
            while line := await self._server.stderr.readline():
                log.write(line)
            log.close()

        self._drain = asyncio.create_task(drain())
        return address

    # -- clients -------------------------------------------------------------------------------

    async def _client(self) -> None:
        while time.monotonic() < self._end:
            await self._open.wait()
            self._busy += 1
            try:
                await self._one_request()
            except Exception as error:  # a client that fails is a finding, not the end of the run
                self.totals.wrong.append(f"a client failed: {error!r}")
            finally:
                self._busy -= 1

    async def _one_request(self) -> None:
        kind = self._rng.random()
        index = self._rng.randrange(len(self._requests))
        path, body = self._requests[index]
        began = time.monotonic()
        if kind < 0.1:
            self.totals.requests["disconnects"] += 1
            with suppress(TimeoutError, httpx.TransportError):
                async with asyncio.timeout(self._rng.expovariate(3.0)):
                    await self._ask(path, body)
        elif kind < 0.15:
            await self._ask_badly()
        elif kind < 0.18:
            self.totals.requests["slow readers"] += 1
            streams = [one for one in self._requests if one[1].get("stream")]
            path, body = self._rng.choice(streams)
            expected = self._expected[self._requests.index((path, body))]
            outcome = await self._ask(path, body, pause=0.3)
            self._judge(f"slow {path}", outcome, expected, began)
        else:
            self.totals.requests["healthy"] += 1
            outcome = await self._ask(path, body)
            self._judge(f"{path} {json.dumps(body)[:80]}", outcome, self._expected[index], began)

    def _judge(self, what: str, outcome: Outcome, expected: str | None, began: float) -> None:
        code = outcome.code
        self.totals.outcomes[code or "complete"] += 1
        if code == "queue_full":
            return
        if code is not None:
            if code not in IN_WINDOW or not self._in_window(began):
                self.totals.wrong.append(f"{what}: {code} outside of any window")
            if expected is not None and not _begins(expected, outcome.text):
                self.totals.wrong.append(f"{what}: said {outcome.text!r} before {code}")
            return
        if outcome.ends != outcome.expected_ends:
            self.totals.wrong.append(f"{what}: {outcome.ends} ends, not {outcome.expected_ends}")
        if expected is not None and outcome.text != expected:
            self.totals.wrong.append(f"{what}: {outcome.text!r} instead of {expected!r}")

    def _in_window(self, began: float) -> bool:
        now = time.monotonic()
        return any(first - 0.5 <= now and began <= last for first, last in self._windows)

    async def _ask_badly(self) -> None:
        path, body, status = self._rng.choice(BAD)
        self.totals.requests["bad input"] += 1
        began = time.monotonic()
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        try:
            answer = await self._http.post(path, content=content, headers=headers)
        except httpx.TransportError:
            if not self._in_window(began):
                self.totals.wrong.append(f"bad input to {path}: the connection broke")
            return
        allowed = {status, 429} | ({503} if self._in_window(began) else set())
        self.totals.outcomes[f"bad input: {answer.status_code}"] += 1
        if answer.status_code not in allowed:
            self.totals.wrong.append(f"bad input to {path}: {answer.status_code}, not {status}")

    async def _ask(self, path: str, body: dict[str, Any], pause: float = 0.0) -> Outcome:
        outcome = Outcome()
        try:
            if not body.get("stream"):
                answer = await self._http.post(path, json=body)
                if answer.status_code != 200:
                    outcome.code = _code_of(answer.content)
                else:
                    outcome.text = _text_of(answer.json())
                return outcome
            async with self._http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    outcome.code = _code_of(await response.aread())
                    return outcome
                await _read_stream(response, body, outcome, pause)
        except httpx.TransportError:
            outcome.code = "connection"
        return outcome

    # -- faults --------------------------------------------------------------------------------

    def _processes(self) -> dict[str, list[psutil.Process]]:
        found: dict[str, list[psutil.Process]] = {"main": [], "engine": [], "worker": []}
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self._server.pid)
            found["main"].append(main)
            for child in main.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    command = " ".join(child.cmdline())
                    if "engine_process" in command:
                        found["engine"].append(child)
                    elif "http_worker" in command:
                        found["worker"].append(child)
        return found

    async def _wait(self, seconds: float) -> bool:
        """Wait; return False if the soak ends before."""
        left = self._end - 20 - time.monotonic()
        await asyncio.sleep(max(0.0, min(seconds, left)))
        return seconds < left

    async def _kill_engines(self) -> None:
        while await self._wait(self._options.engine_kill_seconds):
            await self._kill("engine")

    async def _kill_workers(self) -> None:
        while await self._wait(self._options.worker_kill_seconds):
            await self._kill("worker")

    async def _kill(self, role: str) -> None:
        """Kill a process of this role, and note the window until its successor serves."""
        before = sorted(self._processes()[role], key=psutil.Process.create_time)
        if len(before) < 1 + (role == "worker"):
            return
        window = [time.monotonic(), float("inf")]
        self._windows.append(window)
        # The oldest worker stays, so that the memory of one is seen all the time.
        victim = self._rng.choice(before[1:] if role == "worker" else before)
        victim.kill()
        self.totals.faults[f"{role} killed"] += 1
        known = {process.pid for process in before}
        while not {process.pid for process in self._processes()[role]} - known:
            await asyncio.sleep(0.2)
        await self._wait_ready()
        window[1] = time.monotonic() + 1.0

    async def _wait_ready(self) -> None:
        ready = 0
        while ready < READY_IN_A_ROW:
            ready = ready + 1 if await self._is_ready() else 0
            await asyncio.sleep(0.1)

    async def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return (await self._http.get("/ready")).status_code == 200
        return False

    async def _burst(self) -> None:
        while await self._wait(self._options.burst_seconds):
            await self._open.wait()
            self.totals.faults["burst over the queue's limit"] += 1
            self._busy += 1
            await asyncio.gather(*(self._one_request() for _ in range(3 * QUEUE)))
            self._busy -= 1

    async def _rest(self) -> None:
        """Let all clients pause now and then, and look at blocks and memory."""
        while await self._wait(self._options.rest_seconds):
            self._open.clear()
            while self._busy:
                await asyncio.sleep(0.1)
            await self._check_idle()
            now = time.monotonic()
            for role, processes in self._processes().items():
                for process in processes:
                    with suppress(psutil.NoSuchProcess):
                        size = process.memory_full_info().uss / 1e6
                        self._samples[role, process.pid].append((now, size))
            self._open.set()

    async def _check_idle(self) -> None:
        """Check that, a while after the last request, nothing runs and no block is held."""
        stats: dict[str, Any] = {}
        await self._wait_ready()
        for _ in range(100):
            with suppress(httpx.TransportError):
                answer = await self._http.get("/debug/engine")
                stats = answer.json().get("stats") or {}
                if (
                    stats
                    and stats["num_running"] == stats["num_waiting"] == 0
                    and stats["num_free_blocks"] == stats["num_blocks"]
                ):
                    self.totals.faults["pauses in which every block was free"] += 1
                    return
            await asyncio.sleep(0.2)
        self.totals.wrong.append(f"blocks or requests are left: {stats}")

    # -- memory --------------------------------------------------------------------------------

    def slopes(self) -> dict[str, float]:
        """Return the growth in MB a minute of each process that lived long enough."""
        slopes = {}
        for (role, pid), samples in self._samples.items():
            first = samples[0][0]
            late = [(at, size) for at, size in samples if at - first >= WARM_SECONDS]
            if len(late) >= 3 and late[-1][0] - late[0][0] >= MEASURED_SECONDS:
                slopes[f"{role} {pid}"] = _slope(late)
        return slopes


def _begins(whole: str, cut: str) -> bool:
    """Return whether the text of each choice begins as it should."""
    pairs = zip(whole.split("\0"), cut.split("\0"), strict=False)
    return all(text.startswith(begun) for text, begun in pairs)


def _slope(samples: list[tuple[float, float]]) -> float:
    """Fit a line by least squares; return its slope in MB a minute."""
    mean_at = sum(at for at, _ in samples) / len(samples)
    mean_size = sum(size for _, size in samples) / len(samples)
    over = sum((at - mean_at) * (size - mean_size) for at, size in samples)
    return 60 * over / sum((at - mean_at) ** 2 for at, _ in samples)


def _code_of(content: bytes) -> str:
    try:
        return _code_in(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return f"an answer that is no error: {content[:100]!r}"


def _code_in(error: dict[str, Any]) -> str:
    return str(error.get("code") or CODES.get(error["type"], error["type"]))


def _text_of(answer: dict[str, Any]) -> str:
    """Return all text of a whole answer of any API."""
    if "choices" in answer:
        return "\0".join(
            str(choice["message"]["content"] if "message" in choice else choice["text"])
            for choice in answer["choices"]
        )
    if answer.get("type") == "message":
        return "".join(block.get("text", "") for block in answer["content"])
    return json.dumps([item.get("content") for item in answer["output"]], default=str)


async def _read_stream(
    response: httpx.Response, body: dict[str, Any], outcome: Outcome, pause: float
) -> None:
    """Read a stream's events into the outcome."""
    texts: dict[int, str] = defaultdict(str)
    is_message = response.url.path.endswith("/messages")
    outcome.expected_ends = 1 if is_message else body.get("n", 1) + 1
    paused = 0
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if pause and paused < 8:
            paused += 1
            await asyncio.sleep(pause)
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            outcome.ends += 1
            continue
        event = json.loads(data)
        if "error" in event and event["error"]:
            outcome.code = _code_in(event["error"])
        if is_message:
            outcome.ends += event["type"] == "message_stop"
            texts[0] += event.get("delta", {}).get("text", "")
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or choice
            texts[choice["index"]] += delta.get("content") or delta.get("text") or ""
            outcome.ends += choice.get("finish_reason") is not None
    outcome.text = "\0".join(texts[index] for index in sorted(texts))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--http-workers", type=int, default=2)
    parser.add_argument("--engine-kill-seconds", type=float, default=100)
    parser.add_argument("--worker-kill-seconds", type=float, default=70)
    parser.add_argument("--burst-seconds", type=float, default=60)
    parser.add_argument("--rest-seconds", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", nargs="*", default=[], help="default: the demo model")
    parser.add_argument("--json", default="build/soak.json", help="file for the results")
    parser.add_argument("--log", default="build/soak.log", help="file for the server's log")
    return parser.parse_args()


def main() -> int:
    """Soak, print a table, and write the results as JSON."""
    options = _parse()
    for name in (options.json, options.log):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
    soak = Soak(options)
    asyncio.run(soak.run())
    totals, slopes = soak.totals, soak.slopes()
    totals.wrong += [
        f"{name} grows by {slope:.2f} MB a minute"
        for name, slope in slopes.items()
        if slope >= MAX_SLOPE
    ]
    for title, counts in (
        ("requests", totals.requests), ("outcomes", totals.outcomes), ("faults", totals.faults)
    ):  # fmt: skip
        print(f"\n| {title} | |\n|---|---|")
        for name, number in sorted(counts.items()):
            print(f"| {name} | {number:,} |")
    print("\n| memory | MB a minute |\n|---|---|")
    for name, slope in slopes.items():
        print(f"| {name} | {slope:+.2f} |")
    print(f"\nwrong: {len(totals.wrong)}")
    for line in totals.wrong[:20]:
        print(f"  {line[:300]}")
    results = {
        "minutes": options.minutes, "requests": totals.requests, "outcomes": totals.outcomes,
        "faults": totals.faults, "megabytes_a_minute": slopes, "wrong": totals.wrong,
    }  # fmt: skip
    Path(options.json).write_text(json.dumps(results, indent=2), encoding="utf-8")
    return 1 if totals.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
