"""Several HTTP processes in front of one engine: `--http-workers 2`, with a fake core."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from quire.engine.errors import QueueFullError, StartupError
from quire.server.http.limits import InFlight, no_loads
from quire.server.metrics.metrics import Metrics
from quire.server.serving import pool_worker, worker_pool
from quire.server.serving.pool_worker import PoolWorker
from quire.server.serving.worker_pool import WorkerPool
from quire.server.settings import load_settings

from ..fakes import FakeEngineClient
from ..openai_http import until
from ..test_cli import SLOW, Server, assert_error_and_done, launch, texts

WORKERS = 2
RESUMABLE = {"x-quire-resumable": "1"}
TWO_WORKERS = ("--http-workers", str(WORKERS))


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[Server]:
    with launch(*TWO_WORKERS, *flags, core="build_slow_chat_core") as process:
        server = Server(process)
        with server.http:
            yield server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--shutdown-timeout", "1") as server:
        yield server


def completion(first_token: int = 100, max_tokens: int = 3) -> dict[str, Any]:
    prompt = [first_token, 1, 2]
    return {"model": "fake", "prompt": prompt, "max_tokens": max_tokens, "stream": True}


def events_of(response: httpx.Response) -> list[str]:
    lines = response.text.splitlines()
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def worker_of(client: httpx.Client) -> int:
    """Return the index of the worker that serves the connection of `client`."""
    answer = client.post("/v1/completions", json=completion(), headers=RESUMABLE)
    assert answer.status_code == 200 and "[DONE]" in answer.text
    return int(answer.headers["x-quire-stream-id"].rpartition("w")[2])


@contextlib.contextmanager
def connections(server: Server) -> Iterator[list[httpx.Client]]:
    """Yield a connection to each worker, in their order, once all of them are ready."""
    found: dict[int, httpx.Client] = {}
    deadline = time.monotonic() + 60
    with contextlib.ExitStack() as stack:
        while len(found) < WORKERS:
            assert time.monotonic() < deadline, f"only the workers {list(found)} are ready"
            url, headers = server.http.base_url, server.http.headers
            client = httpx.Client(base_url=url, timeout=20, headers=headers)
            if (
                client.get("/ready").status_code == 200
                and (index := worker_of(client)) not in found
            ):
                found[index] = client
                stack.callback(client.close)
            else:
                client.close()
                time.sleep(0.01)
        yield [found[index] for index in range(WORKERS)]


def samples(client: httpx.Client) -> dict[frozenset[str], float]:
    """Return the values of all metrics by name and label values."""
    return {
        frozenset((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


def total(client: httpx.Client, name: str, *labels: str) -> float:
    return sum(value for key, value in samples(client).items() if key >= {name, *labels})


def workers_of(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "quire.server.serving.http_worker" in child.cmdline()]


def running(server: Server) -> int:
    count: int = server.http.get("/debug/engine").json()["stats"]["num_running"]
    return count


def test_each_worker_reports_the_metrics_of_all(server: Server) -> None:
    with connections(server) as clients:
        time.sleep(0.2)  # until all steps are counted
        before = samples(clients[0])
        for client in [*clients, clients[1]]:
            worker_of(client)
        sent = "http_requests_total", "200", "/v1/completions", "POST"
        # A request is counted after its answer has been sent.
        until(lambda: total(clients[0], *sent) >= before.get(frozenset(sent), 0.0) + 3, 5.0)
        pages = [samples(client) for client in clients]
        for page in pages:
            deltas = {key: value - before.get(key, 0.0) for key, value in page.items()}
            for expected, *key in (
                (3, *sent),
                (9, "quire:generation_tokens_total", "0", "fake"),
                (3, "quire:time_to_first_token_seconds_count", "0", "fake"),
                (3, "quire:request_success_total", "0", "fake", "length"),
            ):
                assert deltas[frozenset(key)] == expected, key
        (info,) = [value for key, value in page.items() if "quire:cache_config_info" in key]
        assert info == 1.0
        steps = "quire:iteration_tokens_total_count", "0", "fake"
        # Steps are counted once, although both workers receive their statistics.
        until(lambda: total(clients[0], steps[0]) == before[frozenset(steps)] + 9, 5.0)
        text = clients[0].get("/metrics").text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_probes_and_models_are_the_same_from_each(server: Server) -> None:
    with connections(server) as clients:
        for path in ("/health", "/ready", "/live", "/load", "/v1/models", "/debug/engine"):
            first, second = (client.get(path) for client in clients)
            assert first.status_code == second.status_code == 200
            answers = [first.json(), second.json()]
            for answer in answers:
                answer.pop("stats", None)
            assert answers[0] == answers[1]


def respond(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": "fake", "input": "hi", "max_output_tokens": 4, **fields}
    answer = client.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    response: dict[str, Any] = answer.json()
    return response


def test_a_response_is_found_through_the_other_worker(server: Server) -> None:
    with connections(server) as (zero, one):
        made = respond(zero)
        assert made["id"].endswith("w0")
        counter = ("http_requests_total", "/v1/responses/{response_id}", "200")
        seen = total(one, *counter)
        got = one.get(f"/v1/responses/{made['id']}", headers={"x-request-id": "mine"})
        assert got.status_code == 200 and got.json() == made
        assert got.headers["x-request-id"] == "mine"
        until(lambda: total(one, *counter) > seen, 5.0)  # it is counted after it has been sent
        assert total(one, *counter) == seen + 1

        onward = respond(one, previous_response_id=made["id"])
        assert onward["previous_response_id"] == made["id"] and onward["id"].endswith("w0")
        body = {"input": "on", "previous_response_id": onward["id"], "max_output_tokens": 4}
        streamed = one.post("/v1/responses", json={**body, "stream": True})
        assert "event: response.incomplete" in streamed.text

        slow = respond(one, background=True, max_output_tokens=5000)
        assert slow["status"] in ("queued", "in_progress") and slow["id"].endswith("w1")
        cancelled = zero.post(f"/v1/responses/{slow['id']}/cancel")
        assert cancelled.json()["status"] == "cancelled"
        assert zero.delete(f"/v1/responses/{slow['id']}").json()["deleted"]
        for client, missing in itertools.product((zero, one), (slow["id"], "resp_w0", "resp_w7")):
            assert client.get(f"/v1/responses/{missing}").status_code == 404
        until(lambda: running(server) == 0)


def test_a_stream_resumes_through_the_other_worker(server: Server) -> None:
    with connections(server) as (zero, one):
        events: list[str] = []
        body = completion(SLOW, 60)
        with zero.stream("POST", "/v1/completions", json=body, headers=RESUMABLE) as begun:
            for line in begun.iter_lines():
                events += [line.removeprefix("id: ")] if line.startswith("id: ") else []
                if len(events) == 5:
                    break
        stream_id = begun.headers["x-quire-stream-id"]
        assert stream_id.endswith("w0")
        rest = one.get(f"/v1/streams/{stream_id}", headers={"last-event-id": events[-1]})
        assert rest.status_code == 200 and rest.headers["x-quire-stream-id"] == stream_id
        lines = rest.text.splitlines()
        events += [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]
        assert events == [f"{stream_id}-{number}" for number in range(len(events))]
        assert "data: [DONE]" in lines and len(events) >= 60
        assert one.delete(f"/v1/streams/{stream_id}").json()["deleted"]
        assert one.get(f"/v1/streams/{stream_id}").status_code == 410


def test_a_disconnect_aborts_a_forwarded_request(server: Server) -> None:
    with connections(server) as (zero, one):
        made = respond(zero)
        body = {"input": "on", "previous_response_id": made["id"], "stream": True}
        with one.stream("POST", "/v1/responses", json=body) as response:
            next(response.iter_lines())
            assert running(server) == 1
        until(lambda: running(server) == 0, 2.0)


def test_the_streams_of_all_workers_go_on_when_the_engine_is_killed(server: Server) -> None:
    with connections(server) as clients, contextlib.ExitStack() as stack:
        body = completion(SLOW, 80)
        undisturbed = texts(events_of(clients[0].post("/v1/completions", json=body)))
        streams = []
        for client in clients:
            stream = client.stream("POST", "/v1/completions", json=body)
            lines = stack.enter_context(stream).iter_lines()
            streams.append(chain([next(lines)], lines))
        children = psutil.Process(server.process.pid).children()
        (engine,) = [child for child in children if child not in workers_of(server)]
        engine.kill()
        for lines in streams:
            events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
            assert texts(events) == undisturbed
    with connections(server) as clients:
        for client in clients:
            assert client.get("/ready").status_code == 200
        assert total(clients[1], "quire:engine_restarts_total") == 1


def test_a_killed_worker_ends_only_its_own_requests_and_is_replaced(server: Server) -> None:
    with connections(server) as clients, contextlib.ExitStack() as stack:
        time.sleep(1.5)  # until the main process knows the worker's counts
        before = total(clients[0], "quire:request_success_total")
        streams = []
        for client in clients:
            stream = client.stream("POST", "/v1/completions", json=completion(SLOW, 150))
            lines = stack.enter_context(stream).iter_lines()
            streams.append(lines)
            next(lines)
        assert running(server) == 2
        workers = workers_of(server)
        workers[0].kill()
        # The engine aborts the request of the killed worker only.
        until(lambda: running_on_new_connection(server) == 1, 2.0)
        ends = []
        for lines in streams:
            try:
                ends.append([line for line in lines if line][-1])
            except httpx.RemoteProtocolError as error:
                ends.append(str(error))
        assert sum(end == "data: [DONE]" for end in ends) == 1, ends
    with connections(server) as (fresh, _):
        assert total(fresh, "quire:http_worker_restarts_total") == 1
        assert total(fresh, "quire:request_success_total") > before
        loads = fresh.get("/debug/engine").json()["admission"]
        assert (loads["num_queued"], loads["num_running"], loads["queued_tokens"]) == (0, 0, 0)


def running_on_new_connection(server: Server) -> int:
    """Count running sequences over a new connection, since the old one may be dead."""
    with httpx.Client(base_url=server.http.base_url) as client:
        try:
            count: int = client.get("/debug/engine").json()["stats"]["num_running"]
        except httpx.TransportError:
            return -1
        return count


def test_a_drain_ends_all_workers_and_the_exit_code_is_0(server: Server) -> None:
    """SIGTERM ends every worker after the drain. No later test can use this server."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    with connections(server) as clients, contextlib.ExitStack() as stack:
        streams = []
        for client, max_tokens in zip(clients, (1000, 20), strict=True):
            body = completion(SLOW, max_tokens)
            lines = stack.enter_context(client.stream("POST", "/v1/completions", json=body))
            streams.append(lines.iter_lines())
            next(streams[-1])
        others = [
            stack.enter_context(httpx.Client(base_url=server.http.base_url)) for _ in "123456"
        ]
        for other in others:
            assert other.get("/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        for worker in workers_of(server):
            worker.terminate()  # as a service manager does; only the main process acts on it
        for other in others:
            until(lambda other=other: other.get("/ready").status_code == 503, 1.0)
            refused = other.post("/v1/completions", json={"model": "fake", "prompt": "x"})
            assert refused.json()["error"]["code"] == "shutting_down"
        long, short = (
            [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
            for lines in streams
        )
        assert json.loads(short[-2])["choices"][0]["finish_reason"] == "length"
        assert_error_and_done(long, "engine_dead")
    assert server.process.wait(timeout=10) == 0
    assert not [child for child in children if child.is_running()]


def test_all_processes_end_with_the_main_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server listens on a unix socket here."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # no process is left to remove the folders
    with serving("--uds", str(tmp_path / "quire.sock")) as server:
        with server.stream(100, 3) as events:
            assert list(events)[-1] == "[DONE]"
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(children) == WORKERS + 1
        server.process.kill()
        dead = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        until(lambda: all(not c.is_running() or c.status() in dead for c in children), 5.0)


@pytest.mark.parametrize(
    "core, flags, message",
    [
        ("build_broken_core", (), "quire: the weights are broken"),
        ("build_core", ("--generation-config", "/no/such"), "quire: generation_config"),
    ],
)
def test_a_failed_start_is_one_line(core: str, flags: tuple[str, ...], message: str) -> None:
    with launch(*TWO_WORKERS, *flags, core=core) as process:
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    assert stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in stderr


def test_queue_limits_hold_for_the_sum_of_all_workers() -> None:
    settings = load_settings(max_num_seqs=1, max_num_queued_reqs=2, max_num_queued_tokens=50)
    loads = no_loads(2)
    zero, one = (InFlight(settings, FakeEngineClient(), index, loads) for index in range(2))
    first, second = zero.admit(1, 0, 10), one.admit(2, 0, 10)
    for admission in (zero, one):
        with pytest.raises(QueueFullError, match="3 requests are waiting"):
            admission.admit(1, 0)
        assert (admission.num_queued, admission.queued_tokens) == (3, 20)
    second.close()
    with pytest.raises(QueueFullError, match="10 prompt tokens are waiting"):
        one.admit(1, 0, 41)
    first.started()
    assert (one.num_queued, one.num_running, one.queued_tokens) == (0, 1, 0)
    first.close()
    assert list(loads) == [0] * 6


def test_settings_reach_a_worker_unchanged() -> None:
    settings = load_settings(
        api_key=("a", "b"), max_body_bytes="2MiB", ssl_keyfile="k", ssl_certfile="c", max_n=7
    )
    assert load_settings(**settings.model_dump(mode="json", exclude={"config"})) == settings


async def test_a_worker_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stopped by a signal keeps its link open, so only its silence tells."""
    monkeypatch.setattr(pool_worker, "ANSWER_SECONDS", 0.02)
    monkeypatch.setattr(worker_pool, "SAMPLES_SECONDS", 0.02)
    metrics = Metrics("fake")
    pool = WorkerPool(load_settings(http_workers=2), None, _NoEngine(), metrics)  # type: ignore[arg-type]
    workers = [_Worker(answers=True), _Worker(answers=False)]
    pool._workers = dict(enumerate(workers))  # type: ignore[arg-type]
    watching = asyncio.create_task(pool._take_samples())
    async with asyncio.timeout(5):
        while not workers[1].killed:
            await asyncio.sleep(0.01)
    assert not workers[0].killed and workers[1].silence == worker_pool.MAX_SILENCE
    pool._stopping.set()
    await watching
    os.close(pool._counters)


class _NoEngine:
    on_status: Any = None


class _Worker(PoolWorker):
    """A worker that answers questions at once, or never."""

    def __init__(self, *, answers: bool) -> None:
        super().__init__(None, self, b"worker")  # type: ignore[arg-type]
        self.up = True
        self.answers = answers
        self.killed = False

    def send(self, message: Any) -> None:
        if self.answers:
            self.take_samples([])

    def kill(self) -> None:
        self.killed = True


def test_workers_count_together_for_a_key_and_follow_the_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("alice: {key: sk-old, requests_per_minute: 1000}")
    with serving("--api-keys-file", str(path)) as server:
        server.http.headers["authorization"] = "Bearer sk-old"
        left = []
        with connections(server) as clients:
            for client in (*clients, *clients):
                answer = client.post("/v1/completions", json=completion())
                left.append(int(answer.headers["x-ratelimit-remaining-requests"]))
            assert left == list(range(left[0], left[0] - 4, -1))
            path.write_text("alice: {key: sk-new, requests_per_minute: 5}")
            until(lambda: {one.get("/v1/models").status_code for one in clients} == {401})
            for client in clients:
                client.headers["authorization"] = "Bearer sk-new"
                answer = client.post("/v1/completions", json=completion())
                assert answer.status_code == 429  # what the old key used counts for its holder
                assert answer.headers["x-ratelimit-limit-requests"] == "5"
        until(lambda: total(server.http, "quire:key_rejections_total", "alice") == WORKERS)


async def test_a_worker_that_cannot_be_started_again_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the descriptors are exhausted at that moment. The first start must succeed."""
    monkeypatch.setattr(worker_pool, "FIRST_DELAY_SECONDS", 0.01)
    pool = WorkerPool(load_settings(http_workers=1), None, _NoEngine(), Metrics("fake"))  # type: ignore[arg-type]
    lives = []

    async def live(index: int, life: int, folder: Path) -> int:
        lives.append(life)
        if life == 1:
            raise OSError(24, "Too many open files")
        if life == 2:
            raise StartupError("an HTTP worker cannot be started")
        if life == 3:
            pool._stopping.set()
        return 1

    monkeypatch.setattr(pool, "_live", live)
    await asyncio.wait_for(pool._keep(0, Path()), 5)
    assert lives == [0, 1, 2, 3]

    async def fails(index: int, life: int, folder: Path) -> int:
        raise StartupError("no tokenizer")

    monkeypatch.setattr(pool, "_live", fails)
    with pytest.raises(StartupError, match="no tokenizer"):
        await pool._keep(0, Path())
    os.close(pool._counters)
