"""`quire serve` as a process, with the fake core of tests/engine in place of a model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from quire.engine.errors import ConfigurationError
from quire.server import cli
from quire.server.serving.listener import listening
from quire.server.settings import load_settings

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "configs" / "demo"
SLOW = 5  # a first token that makes the fake core take 20 ms per step
LAUNCHER = """
import sys
from functools import partial
from quire.engine.process.process_client import ProcessEngineClient
from quire.server import cli
sys.exit(cli.main(sys.argv[2:], partial(ProcessEngineClient, core=sys.argv[1])))
"""


class Server:
    """A running server, its log until it was ready, and an HTTP client for it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[dict[str, Any]] = []
        while not self.log or self.log[-1].get("event") != "ready":
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line, f"the server ended: {self.log}"
            if line.startswith("{"):
                self.log.append(json.loads(line))
        address = self.log[-1]["address"]
        if address.startswith("unix:"):
            transport = httpx.HTTPTransport(uds=address.removeprefix("unix:"))
            self.http = httpx.Client(base_url="http://quire", timeout=20, transport=transport)
        else:
            self.http = httpx.Client(base_url=address, timeout=20)

    @property
    def engine(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    @contextlib.contextmanager
    def stream(self, first_token: int, max_tokens: int) -> Iterator[Iterator[str]]:
        """Yield the data of each event, after the first event has arrived."""
        body = {
            "model": "fake",
            "prompt": [first_token, 20, 21],
            "max_tokens": max_tokens,
            "stream": True,
        }
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            lines = (line for line in response.iter_lines() if line.startswith("data: "))
            first = next(lines)
            yield (line.removeprefix("data: ") for line in chain([first], lines))

    def wait_ready(self) -> float:
        start = time.monotonic()
        while self.http.get("/ready").status_code != 200:
            assert time.monotonic() - start < 20
            time.sleep(0.02)
        return time.monotonic() - start


@contextlib.contextmanager
def launch(*flags: str, core: str = "build_core") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", "-c", LAUNCHER, f"fakes:{core}", "serve", str(MODEL)]
    path = [str(ROOT / "tests" / "engine"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        [*command, "--port", "0", "--log-format", "json", "--served-model-name", "fake", *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[Server]:
    with launch(*flags) as process:
        server = Server(process)
        with server.http:
            yield server


def assert_error_and_done(events: list[str], code: str) -> None:
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2]).get("error", {}).get("code") == code, events[-3:]


def test_engine_restart_drain_and_clean_exit() -> None:
    with serving("--shutdown-timeout", "1") as server:
        # Kill the engine during a stream: an error event, then not ready, then ready again.
        with server.stream(SLOW, 1000) as events:
            server.engine.kill()
            assert_error_and_done(list(events), "engine_dead")
        for path, status in (("/ready", 503), ("/health", 503), ("/live", 200)):
            assert server.http.get(path).status_code == status
        print(f"ready again after {server.wait_ready():.2f} s")
        assert "quire:engine_restarts_total" in server.http.get("/metrics").text

        # SIGTERM during streams: not ready, new requests are refused, the short stream ends, and
        # the long one gets an error event.
        engine = server.engine
        with server.stream(SLOW, 1000) as long, server.stream(SLOW, 20) as short:
            server.process.send_signal(signal.SIGTERM)
            while server.http.get("/ready").status_code == 200:
                time.sleep(0.01)
            refused = server.http.post("/v1/completions", json={"model": "fake", "prompt": "x"})
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert refused.json()["error"]["code"] == "shutting_down"
            ended = list(short)
            assert json.loads(ended[-2])["choices"][0]["finish_reason"] == "length"
            assert_error_and_done(list(long), "engine_dead")
        assert server.process.wait(timeout=10) == 0
        assert not engine.is_running()


def test_a_second_interrupt_exits_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server listens on a unix socket here."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # no process is left to remove the engine's folder
    path = str(tmp_path / "quire.sock")
    with serving("--uds", path) as server, server.stream(SLOW, 1000):
        engine = server.engine
        server.process.send_signal(signal.SIGINT)
        while server.http.get("/ready").status_code == 200:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=5) == 130
        deadline = time.monotonic() + 5
        while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_failed_start_is_one_line_and_an_exit_code() -> None:
    with launch(core="build_broken_core") as process:
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stderr.splitlines()[-1] == "quire: the weights are broken"
    assert "Traceback" not in stderr


def test_a_taken_port_is_reported_before_anything_loads(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "no-such-model", "--port", str(port)]) == 1
    assert capsys.readouterr().err == f"quire: port {port} of 127.0.0.1 is taken\n"


def test_two_servers_cannot_bind_one_port_while_both_load() -> None:
    settings = load_settings(port=0)
    with listening(settings) as first:
        second = load_settings(port=first.getsockname()[1])
        with pytest.raises(ConfigurationError, match="taken"), listening(second):
            pass


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "quire.sock"
    settings = load_settings(uds=str(path))
    with listening(settings):
        with pytest.raises(ConfigurationError, match="taken"), listening(settings):
            pass
        assert path.is_socket()
    assert not path.exists()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with listening(settings):
        assert path.is_socket()
    path.write_text("precious")
    with pytest.raises(ConfigurationError, match="not a socket"), listening(settings):
        pass
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--port", "x"], "port: Input should be a valid integer"),
        (["--tensor-parallel-size", "0"], "tensor_parallel_size: Input should be greater than"),
        (["--nnodes", "2"], "--nnodes 2 hosts cannot share 1 ranks equally"),
        (["--block-size", "17"], "block_size must be a power of two"),
        (["--host", "no.such.host.invalid"], "cannot listen on"),
        (["--ssl-keyfile", "k", "--ssl-certfile", "c"], "ssl_certfile, ssl_keyfile: "),
        (["--config", "/no/such.yaml"], "config: there is no file"),
    ],
)
def test_wrong_settings_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"quire: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--tool-call-parsers", "--http-worker", "--max-model", "--nope"])
def test_unknown_flags_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["serve", f"{flag}=1"])
    assert exit.value.code == 2
    assert f"unrecognized arguments: {flag}=1" in capsys.readouterr().err


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    for flag in ("--max-num-seqs", "--no-enable-prefix-caching", "--kv-cache-memory"):
        assert flag in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("quire ")


def test_a_hangup_drains_like_sigterm() -> None:
    # Whoever runs the tests may ignore the signal, as nohup does, and a child would inherit that.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        _hang_up()
    finally:
        signal.signal(signal.SIGHUP, before)


def _hang_up() -> None:
    with serving("--shutdown-timeout", "10") as server:
        with server.stream(SLOW, 20) as events:
            server.process.send_signal(signal.SIGHUP)
            assert list(events)[-1] == "[DONE]"
        assert server.process.wait(10) == 0


def test_a_server_whose_engine_is_given_up_ends_with_a_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    once = LAUNCHER.replace("core=sys.argv[1]", "core=sys.argv[1], max_restarts=0")
    monkeypatch.setattr(sys.modules[__name__], "LAUNCHER", once)
    with serving() as server:
        server.engine.kill()
        assert server.process.wait(10) == 1
        assert server.process.stderr is not None
        assert "failed again and again" in server.process.stderr.read()
