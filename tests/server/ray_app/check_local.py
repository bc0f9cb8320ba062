"""Check `quire deploy` without a cluster: it starts a local one, and leaves nothing behind.

`make test-ray` runs it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest


@pytest.mark.parametrize("key", ["a key", None])
def test_a_local_cluster_serves_and_ends_with_the_command(tmp_path: Path, key: str | None) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-P", "-m", "quire.server.cli", "deploy", "--port", str(port)]
    command += ["--engine-cpus", "0.1", "--front-cpus", "0.1"]
    command += ["--api-key", key] if key else []
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = psutil.Popen(command, env=environment, stderr=stderr, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 200
        while "quire is deployed" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            body = {"model": "quire-demo", "prompt": "What is a", "max_tokens": 5}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == (401 if key else 200)
            headers = {"Authorization": f"Bearer {key}"}
            answer = client.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-quire-engine"]
        family = process.children(recursive=True)
        assert len(family) > 5
        if key is None:  # no front has a port that other machines reach
            fronts = [one for one in family if any("Front" in word for word in one.cmdline())]
            assert fronts
            for front in fronts:
                listens = [c for c in front.net_connections("tcp") if c.status == "LISTEN"]
                assert not [c for c in listens if 30000 <= c.laddr.port <= 31000]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
        gone, left = psutil.wait_procs(family, 15)
        assert not left, left
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
