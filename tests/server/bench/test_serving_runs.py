"""Test the runs by which a server is calibrated, against a scripted one."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest

from quire.engine.errors import StartupError
from quire.server.bench import serving_runs
from quire.server.bench.serving_runs import CROWDS, LOAD_RUNS, ServedRuns, ServerRuns

from .fake_openai import Answer, FakeServer, fake_server

GETS = {
    "/ready": "ready",
    "/v1/models": {"data": [{"id": "fake-model", "max_model_len": 600}]},
    "/tokenizer_info": {"vocab_size": 50},
    "/metrics": 'quire:iteration_tokens_total_count{model_name="fake-model"} 7.0\n',
}


async def measure(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> ServedRuns:
    monkeypatch.setattr(serving_runs, "MIN_REQUESTS", 4)
    monkeypatch.setattr(serving_runs, "MAX_REQUESTS", 4)
    server.gets |= GETS
    return await ServerRuns(server.url, os.getpid(), lambda text: None).measure()


async def test_runs_differ_in_width_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_server(script=lambda _: Answer((0.02, 0.03))) as server:
        alone, crowds, loads = await measure(server, monkeypatch)
        bodies = server.bodies
    # Each run has prompts of its own, within the vocabulary and half of the context.
    prompts = [tuple(body["prompt"]) for body in bodies]
    assert len(set(prompts)) == len(prompts) == 8 + 10 + 4 * (1 + len(CROWDS) + LOAD_RUNS)
    assert {max(prompt) < 50 for prompt in prompts} == {True}
    assert {len(prompt) for prompt in prompts} == {128, 300}
    assert {body["ignore_eos"] for body in bodies} == {True}
    # Requests alone come one after the other, those of a load at known times.
    gaps = [two.arrival - one.arrival for one, two in pairwise(alone.requests)]
    assert min(gaps) == pytest.approx(max(gaps)) and min(gaps) > 0.05 / 0.5
    assert all(run.requests[-1].arrival > 0 for run in loads) and len(loads) == LOAD_RUNS
    assert [run.requests[0].output_len for run in crowds] == [16, 16, 32, 2, 2]
    for run in (alone, *crowds, *loads):
        assert all(0.02 <= first < last for first, last in zip(run.ttft, run.e2e, strict=True))
        assert run.http_seconds > 0 and run.client_seconds > 0 and run.num_steps == 0


async def test_a_request_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_server(script=lambda number: Answer(status=500)) as server:
        with pytest.raises(StartupError, match="a request failed: http_500: no"):
            await measure(server, monkeypatch)


async def test_a_server_that_does_not_list_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_server() as server:
        monkeypatch.setitem(GETS, "/v1/models", None)
        with pytest.raises(StartupError, match="with 404: if it wants a key"):
            await measure(server, monkeypatch)


async def test_a_server_that_has_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    runs = ServerRuns("http://127.0.0.1:9", process.pid, lambda text: None)
    with pytest.raises(StartupError, match="the server has ended"):
        await runs.measure()
