"""Measure how long `quire serve` takes until it is ready, and how much memory it uses then.

    python -P benchmarks/startup.py [--turns 3] [--first] [MODEL] [flags of quire serve]

This prints the seconds from the start of the process until /ready answers 200, and the CPU seconds
of all processes until then; and for each process its CPU seconds and its resident memory, as a
whole (RSS) and with shared pages divided among the processes that share them (PSS). With `--first`,
every turn has an empty cache of compiled kernels, as an installation's first start has.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import psutil

MIB = 2**20
TIMEOUT = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--first", action="store_true")
    arguments, flags = parser.parse_known_args()
    for _ in range(arguments.turns):
        with tempfile.TemporaryDirectory() as cache:
            measure(flags, {"NUMBA_CACHE_DIR": cache} if arguments.first else {})


def measure(flags: list[str], environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = [sys.executable, "-P", "-m", "quire.server.cli", "serve", *flags]
    began = time.monotonic()
    command = [*serve, "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(command, env=os.environ | environment) as server:
        try:
            while not is_ready(port):
                if server.poll() is not None or time.monotonic() - began > TIMEOUT:
                    sys.exit("the server did not get ready")
                time.sleep(0.02)
            seconds, total, lines = time.monotonic() - began, 0.0, []
            main_process = psutil.Process(server.pid)
            for process in (main_process, *main_process.children(recursive=True)):
                memory, cpu = process.memory_full_info(), process.cpu_times()
                own = cpu.user + cpu.system
                ended = cpu.children_user + cpu.children_system
                total += own + ended
                lines.append(
                    f"  {process.cmdline()[3]:28} CPU {own:5.2f} s, ended children {ended:5.2f} s"
                    f"  RSS {memory.rss / MIB:5.0f}  PSS {memory.pss / MIB:5.0f} MiB"
                )
            print(f"ready after {seconds:.2f} s, CPU {total:.2f} s", *lines, sep="\n", flush=True)
        finally:
            server.terminate()


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=TIMEOUT) as answer:
            return bool(answer.status == 200)
    except OSError:  # a status that is an error too
        return False


if __name__ == "__main__":
    main()
