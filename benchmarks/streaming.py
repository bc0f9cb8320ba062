"""What a streamed chunk costs the HTTP process: real sockets, real engine link, scripted tokens.

    python -P benchmarks/streaming.py [--rate 20000] [--streams 64] [--profile out.prof]

Three processes: this one is the client; the server is `quire serve`'s own code; its engine process
steps a script that gives each stream one token every streams / rate seconds (as fast as it can
with --rate 0). The figure is the server's CPU time per chunk between the 50th chunk of the mean
stream and the 50th before its end: wall time would measure who else is on the machine.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
import tokenizers

from quire.engine.config import EngineConfig, EngineInfo
from quire.engine.outputs import EngineStats, SequenceOutput, StepOutput, Timings
from quire.engine.request import Request

EDGE = 50
"""Chunks of a stream that do not count, at either end."""
TEXT = "A server that streams: it says one word after another, until all has been said. "
BODIES = {
    "completions": {"prompt": [65], "ignore_eos": True},
    "chat": {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True},
}


class ScriptedCore:
    """One token a step for every choice, around and around the tokens of a text."""

    def __init__(self, seconds_per_step: float, token_ids: list[int]) -> None:
        self._period = seconds_per_step
        self._token_ids = token_ids
        self._next = time.monotonic()
        self._left: dict[str, tuple[Request, int]] = {}
        self._step = 0

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model="script",
            architecture="Script",
            device="cpu",
            dtype="float32",
            num_parameters=1,
            vocab_size=max(self._token_ids) + 1,
            max_model_len=100_000,
            block_size=16,
            num_blocks=1_000_000,
            kv_bytes_per_token=1,
            max_num_seqs=4096,
            max_logprobs=20,
            eos_token_ids=(0,),
        )

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def add_request(self, request: Request) -> None:
        self._left[request.request_id] = (request, request.sampling_params.max_tokens)

    def abort_request(self, request_id: str, choice: int | None = None) -> None:
        self._left.pop(request_id, None)

    def reset_prefix_cache(self) -> None:
        pass

    def step(self) -> StepOutput:
        self._next = max(self._next + self._period, time.monotonic() - self._period)
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._step += 1
        outputs = []
        token_ids = self._token_ids
        for request, left in list(self._left.values()):
            last = left == 1
            arrival = request.arrival_time
            for choice in range(request.sampling_params.n):
                outputs.append(
                    SequenceOutput(
                        request.request_id,
                        choice,
                        [token_ids[(self._step + choice) % len(token_ids)]],
                        finish_reason="length" if last else None,
                        num_cached_tokens=0 if self._step == 1 else None,
                        timings=Timings(arrival, arrival, arrival, time.monotonic())
                        if last
                        else None,
                    )
                )
            self._left[request.request_id] = (request, left - 1)
            if last:
                del self._left[request.request_id]
        return StepOutput(outputs, self.stats())

    def stats(self) -> EngineStats:
        zero = dict.fromkeys(EngineStats._fields, 0)
        return EngineStats(**{**zero, "step": self._step, "num_blocks": 1, "num_free_blocks": 1})


def build_core(config: EngineConfig) -> ScriptedCore:
    """For the engine process, as "streaming:build_core"."""
    encoder = tokenizers.Tokenizer.from_file(str(Path(config.model) / "tokenizer.json"))
    return ScriptedCore(float(os.environ["SECONDS_PER_STEP"]), encoder.encode(TEXT).ids)


def serve(port: int, profile: str | None) -> None:
    """The server process; ends with SIGTERM."""
    from quire.server import serving
    from quire.server.settings import load_settings

    serving.ProcessEngineClient = partial(  # type: ignore[misc,assignment]
        serving.ProcessEngineClient, core="streaming:build_core"
    )
    settings = load_settings(
        port=port, generation_config="none", max_num_seqs=4096, log_level="warning", max_n=4096
    )
    profiler = cProfile.Profile(time.process_time)
    if profile:
        profiler.enable()
    serving.serve(settings)
    if profile:
        profiler.disable()
        profiler.dump_stats(profile)


class Result(NamedTuple):
    chunks: int
    cpu: float
    wall: float


def measure(
    port: int, server: psutil.Process, kind: str, streams: int, n: int, tokens: int, resumable: bool
) -> Result:
    """Read all streams to their end in one thread; returns what lay between the edges."""
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    body = msgspec.json.encode({**BODIES[kind], "stream": True, "n": n, "max_tokens": tokens})
    extra = "x-quire-resumable: 1\r\n" if resumable else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n{extra}"
        f"content-length: {len(body)}\r\n\r\n"
    )
    selector = selectors.DefaultSelector()
    for _ in range(streams):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(head.encode() + body)
        selector.register(connection, selectors.EVENT_READ)
    begin, end = EDGE * streams * n, (tokens - EDGE) * streams * n
    marks: list[Result] = []
    seen, left = 0, streams
    while left:
        for key, _ in selector.select():
            received = key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
            seen += received.count(b"data: {")
            if b"data: [DONE]" in received or not received:
                left -= 1
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
        if seen >= (begin, end, sys.maxsize)[len(marks)]:
            times = server.cpu_times()
            marks.append(Result(seen, times.user + times.system, time.perf_counter()))
    assert seen >= tokens * streams * n, f"{seen} chunks are too few"
    first, last = marks
    return Result(*(after - before for after, before in zip(last, first, strict=True)))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _ready(port: int, server: subprocess.Popen[bytes]) -> Iterator[None]:
    """Yields until the server answers /ready with 200."""
    while True:
        assert server.poll() is None, "the server ended"
        try:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(b"GET /ready HTTP/1.1\r\nhost: a\r\n\r\n")
                if b" 200 " in connection.recv(64):
                    return
        except ConnectionError:
            pass
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=20_000, help="chunks a second, 0: no limit")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--n", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--kind", choices=BODIES, default="chat")
    parser.add_argument("--resumable", action="store_true")
    parser.add_argument("--profile", help="write a cProfile of the server here")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.profile)
    period = options.streams * options.n / options.rate if options.rate else 0.0
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        "SECONDS_PER_STEP": str(period),
        "OMP_NUM_THREADS": "1",
    }
    port = _free_port()
    command = [sys.executable, "-P", __file__, "--serve", str(port)]
    if options.profile:
        command += ["--profile", options.profile]
    server = subprocess.Popen(command, env=environment)
    try:
        for _ in _ready(port, server):
            time.sleep(0.1)
        result = measure(
            port,
            psutil.Process(server.pid),
            options.kind,
            options.streams,
            options.n,
            options.tokens,
            options.resumable,
        )
    finally:
        server.terminate()
        server.wait(30)
    micros = result.cpu / result.chunks * 1e6
    print(
        f"{options.kind}, {options.streams} streams, n = {options.n}: {result.chunks} chunks at "
        f"{result.chunks / result.wall:,.0f}/s; CPU {micros:.1f} µs a chunk = "
        f"{1e6 / micros:,.0f} chunks/s a core"
    )


if __name__ == "__main__":
    main()
