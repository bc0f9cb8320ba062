"""Two engines behind one server: `--data-parallel-size 2`, with a fake core in each."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from itertools import chain

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ..openai_http import until
from ..test_cli import SLOW, Server, launch, texts

EVENTS = '{"enable_kv_cache_events": true}'
ENGINE = "quire.engine.process.engine_process"
BODY = {"model": "fake", "prompt": [SLOW, 1, 2], "max_tokens": 80, "stream": True}


@pytest.fixture(params=["1", "2"], ids=["one HTTP process", "two HTTP workers"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    flags = ("--data-parallel-size", "2", "--http-workers", request.param)
    with launch(*flags, "--shutdown-timeout", "5") as process:
        server = Server(process)
        with server.http:
            yield server


def engines_of(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if ENGINE in child.cmdline()]


def values(server: Server, name: str) -> dict[str | None, float]:
    """Return the values of a metric by engine; None is for all together."""
    text = server.http.get("/metrics").text
    return {
        sample.labels.get("engine"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def test_streams_go_on_at_the_other_engine_and_a_drain_waits_for_both(server: Server) -> None:
    assert server.log[-1]["engines"] == 2 and len(engines_of(server)) == 2
    until(lambda: server.http.get("/health").status_code == 200)
    assert server.http.get("/health").json()["engines"] == {"0": "ready", "1": "ready"}
    undisturbed = texts(_data(server.http.post("/v1/completions", json=BODY).iter_lines()))
    with contextlib.ExitStack() as stack:
        streams, names = [], set()
        for _ in range(6):
            client = stack.enter_context(httpx.Client(base_url=server.http.base_url, timeout=30))
            until(lambda client=client: client.get("/ready").status_code == 200)
            response = stack.enter_context(client.stream("POST", "/v1/completions", json=BODY))
            lines = response.iter_lines()
            streams.append(chain([next(lines)], lines))
            names.add(response.headers["x-quire-engine"])
        assert names == {"0", "1"}
        state = server.http.get("/debug/engine").json()
        running = [state["engines"][name]["stats"]["num_running"] for name in "01"]
        assert sum(running) == state["stats"]["num_running"] == 6 and min(running) > 0
        engines_of(server)[0].kill()
        for lines in streams[:5]:
            assert texts(_data(lines)) == undisturbed
        until(lambda: server.http.get("/health").json()["engines"] == {"0": "ready", "1": "ready"})
        restarts = values(server, "quire:engine_restarts_total")
        assert restarts.pop(None) == sum(restarts.values()) == 1 and set(restarts) == {"0", "1"}
        assert values(server, "quire:kv_cache_usage_perc").keys() == {None, "0", "1"}
        assert values(server, "quire:generation_tokens_total").keys() == {None}
        engines = engines_of(server)
        with httpx.Client(base_url=server.http.base_url, timeout=30) as client:
            until(lambda: client.get("/ready").status_code == 200)
            with client.stream("POST", "/v1/completions", json=BODY) as response:
                lines = response.iter_lines()
                first = next(lines)
                server.process.send_signal(signal.SIGTERM)
                assert texts(_data(chain([first], lines))) == undisturbed
    assert server.process.wait(timeout=20) == 0
    assert not [engine for engine in engines if engine.is_running()]


def _data(lines: Iterator[str]) -> list[str]:
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def test_too_many_engines_are_refused_before_anything_loads() -> None:
    with launch("--data-parallel-size", "64", "--device", "cpu") as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, log = process.communicate(timeout=30)
        assert process.returncode == 1 and "needs 64 CPUs" in log and "loading" not in log
