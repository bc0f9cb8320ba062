"""Measure what streaming costs the host, with real sockets and the real engine without its model.

    python benchmarks/streaming.py [--rate 20000] [--streams 64] [--http-workers 2]

This process is the client; the others are those of `quire serve`. In the engine process a script
replaces the model (see scripted_worker.py) and gives each stream one token every streams / rate
seconds. With --rate 0 it is as fast as it can be; then the engine runs ahead of what is sent, and
only the figure of the HTTP processes is meaningful. The figures are CPU times, because wall time
would also measure whatever else runs on the machine: those of the HTTP processes per chunk, and
that of the engine process per step (one token for every choice). They cover the time between the
50th chunk of the mean stream and the 50th chunk before its end.
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

EDGE = 50
"""Chunks at each end of a stream that are not measured."""
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


def _prompt(kind: str, stream: int) -> dict[str, object]:
    """Return a prompt that differs for each stream, so that they do not share blocks."""
    if kind == "chat":
        return {"messages": [{"role": "user", "content": str(stream)}]}
    return {"prompt": [65 + stream % 1000] * 16}


def serve(options: argparse.Namespace) -> None:
    """Run the server process, until SIGTERM ends it."""
    from quire.engine.process.process_client import ProcessEngineClient
    from quire.server.serving import main as serving
    from quire.server.settings import load_settings

    settings = load_settings(
        **({"model": options.model} if options.model else {}),
        port=options.serve,
        http_workers=options.http_workers,
        generation_config="none",
        max_num_seqs=4096,
        max_num_batched_tokens=16384,
        num_gpu_blocks_override=50_000,
        log_level="warning",
        max_n=4096,
    )
    profiler = cProfile.Profile(time.process_time)
    if options.profile:
        profiler.enable()
    serving.serve(settings, partial(ProcessEngineClient, core="scripted_worker:build_core"))
    if options.profile:
        profiler.disable()
        profiler.dump_stats(options.profile)


class Processes:
    """The server's processes: one is the engine's, the others serve HTTP."""

    def __init__(self, main: int) -> None:
        process = psutil.Process(main)
        self.engine, self.http = [], [process]
        for child in process.children():
            is_engine = "quire.engine.process.engine_process" in child.cmdline()
            (self.engine if is_engine else self.http).append(child)

    @staticmethod
    def cpu(processes: list[psutil.Process]) -> float:
        """Return the CPU seconds that the processes have used."""
        return sum(sum(process.cpu_times()[:2]) for process in processes)


class Result(NamedTuple):
    """Counts and seconds, at a moment or between two moments."""

    chunks: int
    http_cpu: float
    engine_cpu: float
    wall: float


def measure(port: int, processes: Processes, options: argparse.Namespace) -> Result:
    """Read all streams to their end in one thread; return the result between the edges."""
    streams, n, tokens = options.streams, options.n, options.tokens
    extra = "x-quire-resumable: 1\r\n" if options.resumable else ""
    fields = {"ignore_eos": True, "stream": True, "n": n, "max_tokens": tokens}
    selector = selectors.DefaultSelector()
    for stream in range(streams):
        body = msgspec.json.encode({**_prompt(options.kind, stream), **fields})
        head = (
            f"POST {PATHS[options.kind]} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json"
            f"\r\n{extra}content-length: {len(body)}\r\n\r\n"
        )
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
            cpu = (processes.cpu(processes.http), processes.cpu(processes.engine))
            marks.append(Result(seen, *cpu, time.perf_counter()))
    assert seen >= tokens * streams * n, f"{seen} chunks are too few"
    first, last = marks
    return Result(*(after - before for after, before in zip(last, first, strict=True)))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _ready(port: int, server: subprocess.Popen[bytes]) -> Iterator[None]:
    """Yield again and again, until the server answers /ready with 200."""
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
    parser.add_argument("--rate", type=float, default=20_000, help="chunks/s; 0 means no limit")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--n", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--kind", choices=PATHS, default="chat")
    parser.add_argument("--http-workers", type=int, default=1)
    parser.add_argument("--resumable", action="store_true")
    parser.add_argument("--profile", help="file to write a cProfile of the only HTTP process to")
    parser.add_argument("--model", help="model whose tokenizer and shape to use; default: the demo")
    parser.add_argument(
        "--serve", type=int, metavar="PORT", help="only serve here, for another client"
    )
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    period = options.streams * options.n / options.rate if options.rate else 0.0
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        "SECONDS_PER_STEP": str(period),
        "OMP_NUM_THREADS": "1",
    }
    port = _free_port()
    command = [sys.executable, "-P", __file__, *sys.argv[1:], "--serve", str(port)]
    server = subprocess.Popen(command, env=environment)
    try:
        for _ in _ready(port, server):
            time.sleep(0.1)
        result = measure(port, Processes(server.pid), options)
    finally:
        server.terminate()
        server.wait(30)
    micros = result.http_cpu / result.chunks * 1e6
    steps = result.chunks / (options.streams * options.n)
    engine = result.engine_cpu / steps * 1e3
    print(
        f"{options.kind}, {options.streams} streams, n = {options.n}: {result.chunks} chunks at "
        f"{result.chunks / result.wall:,.0f}/s; HTTP {micros:.1f} µs of CPU a chunk = "
        f"{1e6 / micros:,.0f} chunks/s a core; engine {engine:.2f} ms a step"
    )


if __name__ == "__main__":
    main()
