"""How long `quire serve` takes to be ready, and the memory that it takes then.

    python -P benchmarks/startup.py [--turns 3] [MODEL] [flags of quire serve]

Seconds from the start of the process to 200 from /ready; of each process the CPU seconds until
then, and its resident memory: all of it (RSS), and with what is shared divided by those who share
it (PSS). The first turn may compile kernels.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
import urllib.request

import psutil

MIB = 2**20
TIMEOUT = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    arguments, flags = parser.parse_known_args()
    for _ in range(arguments.turns):
        measure(flags)


def measure(flags: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = [sys.executable, "-P", "-m", "quire.server.cli", "serve", *flags]
    began = time.monotonic()
    with subprocess.Popen([*serve, "--port", str(port), "--log-level", "error"]) as server:
        try:
            while not is_ready(port):
                if server.poll() is not None or time.monotonic() - began > TIMEOUT:
                    sys.exit("the server did not get ready")
                time.sleep(0.02)
            print(f"ready after {time.monotonic() - began:.2f} s")
            main_process = psutil.Process(server.pid)
            for process in (main_process, *main_process.children(recursive=True)):
                memory, cpu = process.memory_full_info(), process.cpu_times()
                print(
                    f"  {process.cmdline()[3]:28} CPU {cpu.user + cpu.system:5.2f} s"
                    f"  RSS {memory.rss / MIB:5.0f}  PSS {memory.pss / MIB:5.0f} MiB"
                )
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
