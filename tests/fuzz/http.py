"""Send a real server, with a real engine, generated requests and random bytes on both its sockets.

    make fuzz, or python -m tests.fuzz.http --requests 100000

Every answer must be declared: below 500, or one of DECLARED. Every thousand requests the pool must
be empty, and a greedy request must get what it got at the beginning. The engine may never restart.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import zmq

from quire.engine.process import wire
from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams

from .bodies import BASES, encode, mutate

DECLARED = {"grammar_failed", "request_timeout", "queue_timeout"}
"""Codes of errors with a status of 500 and more that are no fault of the server."""
SECONDS = 60.0
"""What one request may take, on a machine with much else to do."""


class Server:
    """`quire serve` with the demo model and few blocks, and the socket of its engine."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self._log = (folder / "log").open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "quire.server.cli", "serve", "--port", "0"]
            + ["--log-format", "json", "--http-workers", "2", "--num-gpu-blocks-override", "64"]
            + ["--max-model-len", "256", "--max-num-seqs", "16", *flags],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder), "QUIRE_ADMIN_API_KEY": "fuzz"},
        )
        self.port = self._read_port()
        (self.engine_socket,) = folder.glob("quire-run-*/engine")

    def _read_port(self) -> int:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("{") and json.loads(line).get("event") == "ready":
                self._drainer = threading.Thread(target=self._drain)
                self._drainer.start()
                return int(json.loads(line)["address"].rsplit(":", 1)[1])
            self._log.write(line)
        raise AssertionError("the server did not start")

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._log.write(line)
        self._log.close()
        self.process.stderr.close()

    def stop(self) -> int:
        """End the server and return its exit code."""
        self.process.terminate()
        code = self.process.wait(60)
        self._drainer.join()
        return code


class Client:
    """A connection that is opened again whenever the server has closed it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Return status and body of the answer."""
        headers = {"content-type": "application/json", "authorization": "Bearer fuzz"}
        for attempt in range(2):
            try:
                self._connection.request(method, path, body, headers)
                answer = self._connection.getresponse()
                return answer.status, answer.read()
            except (ConnectionError, http.client.HTTPException):
                self._connection.close()
                if attempt:
                    raise
        raise AssertionError

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Fuzzer:
    """Fuzzes one server, and keeps what it finds in `wrong`."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._seed = seed
        self._client = Client(server.port)
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.num_bytes = 0
        self._names = self._field_names()
        self._canary = self._greedy()

    def _field_names(self) -> list[str]:
        document = json.loads(self._client.ask("GET", "/openapi.json")[1])
        schemas = document["components"]["schemas"].values()
        return sorted({name for schema in schemas for name in schema.get("properties", ())})

    def _greedy(self) -> Any:
        body = {"prompt": "The canary sings", "max_tokens": 20, "temperature": 0}
        status, data = self._client.ask("POST", "/v1/completions", json.dumps(body).encode())
        assert status == 200, data
        return json.loads(data)["choices"]

    def requests(self, count: int, num_threads: int) -> None:
        """Send generated requests from several threads."""

        def work(number: int) -> None:
            rng = random.Random(f"{self._seed} {number}")
            client = Client(self._server.port)
            for _ in range(count // num_threads):
                self._one(rng, client)
            client.close()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one(self, rng: random.Random, client: Client) -> None:
        path, body = rng.choice(BASES)
        data = encode(rng, mutate(rng, body, self._names))
        try:
            status, answer = client.ask("POST", path, data)
        except OSError as error:
            self.wrong.append(f"{path} {data!r}: {error!r}")
            return
        self.statuses[status] += 1
        text = answer.decode("utf-8")
        if status < 400:
            return
        try:
            error = json.loads(text)["error"]
            code = error.get("code")
            assert isinstance(error["message"], str) and error["type"]
        except (ValueError, KeyError, TypeError, AssertionError):
            self.wrong.append(f"{path} {data!r}: {status} without an error: {text[:200]}")
            return
        if status >= 500 and code not in DECLARED:
            self.wrong.append(f"{path} {data!r}: {status} {text[:300]}")

    def bytes_on_the_port(self, count: int) -> None:
        """Open connections and send bytes that are HTTP only in part, or not at all."""
        rng = random.Random(f"{self._seed} bytes")
        path, body = BASES[0]
        data = json.dumps(body).encode()
        whole = (
            f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\n\r\n"
        ).encode() + data
        for _ in range(count):
            junk = bytearray(rng.randbytes(rng.randrange(400)) if rng.random() < 0.3 else whole)
            for _ in range(rng.randrange(6)):
                if junk:
                    junk[rng.randrange(len(junk))] = rng.randrange(256)
            self.num_bytes += len(junk)
            with socket.create_connection(("127.0.0.1", self._server.port), SECONDS) as link:
                link.sendall(junk)
                link.settimeout(0.2)
                try:
                    answer = link.recv(65536)
                except (ConnectionError, TimeoutError):  # it may wait for what is missing
                    continue
                status = answer[9:12]
                if answer and (not answer.startswith(b"HTTP/1.1 ") or status >= b"500"):
                    self.wrong.append(f"{bytes(junk)!r}: {answer[:200]!r}")

    def bytes_on_the_engines_socket(self, count: int) -> None:
        """Send the engine's socket bytes, garbled messages, and frames of no message."""
        rng = random.Random(f"{self._seed} engine")
        path = str(self._server.engine_socket)
        context = zmq.Context()
        params = SamplingParams(max_tokens=3)
        request = Request(
            request_id="fuzz", prompt_token_ids=(5, 6), sampling_params=params, arrival_time=0.0
        )
        messages = (wire.Add(request), wire.Abort("x", None), wire.Watch(0))
        genuine = [wire.encode(message) for message in messages]
        for number in range(count):
            if number % 10 == 0:
                with socket.socket(socket.AF_UNIX) as raw:
                    raw.connect(path)
                    raw.sendall(rng.randbytes(rng.randrange(3000)))
                continue
            link = context.socket(zmq.DEALER)
            link.connect(f"ipc://{path}")
            if rng.random() < 0.3:
                link.send(wire.encode(wire.Hello()))
            for _ in range(20):
                garbled = bytearray(rng.choice(genuine))
                for _ in range(rng.randrange(4)):
                    garbled[rng.randrange(len(garbled))] = rng.randrange(256)
                self.num_bytes += len(garbled)
                link.send_multipart([bytes(garbled)] * rng.choice([1, 1, 1, 2, 5]))
            link.close(linger=200)
        context.term()

    def close(self) -> None:
        """Close the fuzzer's own connection."""
        self._client.close()

    def check(self) -> None:
        """Check that nothing is left of all that, and that a greedy request gets what it got."""
        if self._greedy() != self._canary:
            self.wrong.append("the canary's text has changed")
        stats: dict[str, Any] = {}
        for _ in range(100):
            stats = json.loads(self._client.ask("GET", "/debug/engine")[1])["stats"]
            idle = stats["num_running"] == stats["num_waiting"] == 0
            if idle and stats["num_free_blocks"] == stats["num_blocks"]:
                break
            time.sleep(0.1)
        else:
            self.wrong.append(f"something is left: {stats}")
        metrics = self._client.ask("GET", "/metrics")[1].decode()
        for line in metrics.splitlines():
            if "engine_restarts" in line and not line.startswith("#") and not line.endswith(" 0.0"):
                self.wrong.append(f"the engine was restarted: {line}")


def fuzz(num_requests: int, seed: int, num_threads: int = 4) -> Fuzzer:
    """Fuzz a server of its own; the number of raw connections is a twentieth of the requests'."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            fuzzer = Fuzzer(server, seed)
            part = min(num_requests, 2000)
            for number in range(-(-num_requests // part)):
                fuzzer._seed = seed * 1000 + number
                fuzzer.requests(part, num_threads)
                fuzzer.bytes_on_the_port(part // 20)
                fuzzer.bytes_on_the_engines_socket(part // 20)
                fuzzer.check()
                sent = sum(fuzzer.statuses.values())
                print(f"{sent:,} requests, {len(fuzzer.wrong)} wrong", flush=True)
            fuzzer.close()
        finally:
            code = server.stop()
        if code != 0:
            fuzzer.wrong.append(f"the server ended with code {code}")
    return fuzzer


def main() -> int:
    """Run the command line; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    fuzzer = fuzz(options.requests, options.seed)
    print(f"{sum(fuzzer.statuses.values()):,} requests in {time.monotonic() - began:.0f} s")
    print(f"{fuzzer.num_bytes:,} random bytes on the sockets")
    for status, number in sorted(fuzzer.statuses.items()):
        print(f"  {number:>9,}  {status}")
    print(f"wrong: {len(fuzzer.wrong)}")
    for line in fuzzer.wrong[:20]:
        print(f"  {line[:600]}")
    return 1 if fuzzer.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
