"""Test what every EngineClient does, with the engine in a thread and in a process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.errors import EngineNotReadyError, InvalidRequestError, StartupError
from quire.engine.process import process_client
from quire.engine.process.process_client import ProcessEngineClient

from .. import fakes
from ..clients import Observer, collect, tokens_of
from ..fakes import CRASH, SLOW, STAMPED, expected_tokens, make_request
from ..inline_client import InlineEngineClient

Client = InlineEngineClient | ProcessEngineClient


def build(kind: str, model: str = "fake", observer: Observer | None = None) -> Client:
    config = EngineConfig(model=model)
    if kind == "inline":
        return InlineEngineClient(config, fakes.build_core, observer=observer)
    return ProcessEngineClient(config, core="fakes:build_core", observer=observer)


@pytest.fixture(params=["inline", "process"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PYTHONPATH", str(Path(fakes.__file__).parent))
    return str(request.param)


@pytest.fixture
def observer() -> Observer:
    return Observer()


@pytest.fixture
async def client(kind: str, observer: Observer) -> AsyncIterator[Client]:
    client = build(kind, observer=observer)
    await client.start()
    await client.wait_ready()
    yield client
    await client.close()


async def test_streams_tokens_in_order(client: Client) -> None:
    request = make_request(max_tokens=20)
    outputs = await collect(client, request)
    assert tokens_of(outputs) == expected_tokens(request)
    assert [output.finish_reason for output in outputs[-2:]] == [None, "length"]
    assert len(client._streams) == 0


async def test_ends_after_every_choice(client: Client) -> None:
    request = make_request(max_tokens=4, n=3)
    outputs = await collect(client, request)
    for choice in range(3):
        assert tokens_of(outputs, choice) == expected_tokens(request, choice)
    assert sum(output.finish_reason == "length" for output in outputs) == 3


async def test_many_streams_lose_nothing(client: Client) -> None:
    requests = [make_request(100 * i, max_tokens=200) for i in range(1, 51)]
    start = time.monotonic()
    results = await asyncio.gather(*(collect(client, request) for request in requests))
    elapsed = time.monotonic() - start
    for request, outputs in zip(requests, results, strict=True):
        assert tokens_of(outputs) == expected_tokens(request)
    print(f"{50 * 200 / elapsed:.0f} tokens/s")


async def test_latency_from_step_to_item(client: Client) -> None:
    delays = []
    async for output in client.generate(make_request(STAMPED, max_tokens=200)):
        assert output.timings is not None
        delays.append(time.monotonic() - output.timings.finished)
    delays.sort()
    print(f"step to item: p50 {delays[100] * 1e3:.3f} ms, p99 {delays[198] * 1e3:.3f} ms")
    # Far above the usual delay, but a poll interval or a delay like Nagle's would exceed it.
    assert delays[100] < 0.02


async def test_a_refusal_raises_with_its_parameter(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="too many tokens") as caught:
        await collect(client, make_request(max_tokens=60_000))
    assert caught.value.param == "max_tokens"
    assert len(client._streams) == 0
    request = make_request()
    assert tokens_of(await collect(client, request)) == expected_tokens(request)


async def test_request_id_in_use_is_refused(client: Client) -> None:
    request = make_request(SLOW, max_tokens=1000)
    stream = client.generate(request)
    await anext(stream)
    with pytest.raises(InvalidRequestError, match="in use"):
        await collect(client, request)
    assert (await anext(stream)).token_ids == [SLOW + 1]
    await stream.aclose()


async def wait_idle(client: Client) -> None:
    async with asyncio.timeout(5):
        while (stats := client.stats()) is None or stats.num_running:
            await asyncio.sleep(0.01)


async def test_abort_ends_one_choice_then_all(client: Client) -> None:
    request = make_request(SLOW, max_tokens=10_000, n=3)
    reasons: list[tuple[int, str]] = []
    async for output in client.generate(request):
        if output.finish_reason is not None:
            reasons.append((output.choice, output.finish_reason))
            client.abort(request.request_id)
        elif output.token_ids == [SLOW + 3] and output.choice == 0:
            client.abort(request.request_id, 1)
    assert reasons[0] == (1, "abort")
    assert sorted(reasons) == [(choice, "abort") for choice in range(3)]
    client.abort("never heard of")
    await wait_idle(client)


async def test_closing_early_aborts(client: Client) -> None:
    stream = client.generate(make_request(SLOW, max_tokens=10_000, n=2))
    await anext(stream)
    await stream.aclose()
    assert len(client._streams) == 0
    await wait_idle(client)


async def test_cancelling_the_consumer_aborts(client: Client) -> None:
    task = asyncio.create_task(collect(client, make_request(SLOW, max_tokens=10_000)))
    async with asyncio.timeout(5):
        while (stats := client.stats()) is None or not stats.num_running:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_idle(client)


async def test_resets_the_prefix_cache(client: Client) -> None:
    await client.reset_prefix_cache()
    await collect(client, make_request())
    stats = client.stats()
    assert stats is not None and stats.preemptions == 1  # the fake counts its resets there


async def test_reports_to_its_observer(client: Client, observer: Observer) -> None:
    assert observer.infos == [client.info]
    await collect(client, make_request(max_tokens=7))
    steps = [stats.step for stats in observer.stats]
    assert sorted(set(steps) - {0}) == list(range(1, 8))
    assert steps == sorted(steps)


async def test_close_ends_open_streams_and_is_idempotent(client: Client) -> None:
    task = asyncio.create_task(collect(client, make_request(SLOW, max_tokens=10_000, n=2)))
    while len(client._streams) == 0:
        await asyncio.sleep(0.01)
    await client.close()
    await client.close()
    last = {output.choice: output for output in await task}
    for output in last.values():
        assert output.finish_reason == "error"
        assert output.error is not None and output.error.code == "engine_dead"
    assert sorted(last) == [0, 1]
    assert not client.health().ready
    with pytest.raises(EngineNotReadyError):
        await collect(client, make_request())


async def test_a_crash_ends_the_request_that_causes_it(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_client, "FIRST_DELAY_SECONDS", 0.02)
    outputs = await collect(client, make_request(CRASH))
    assert outputs[-1].finish_reason == "error"
    assert outputs[-1].error is not None and outputs[-1].error.code == "engine_dead"
    assert not client.health().ready


async def test_not_ready_before_the_start(kind: str) -> None:
    client = build(kind)
    with pytest.raises(EngineNotReadyError):
        _ = client.info
    with pytest.raises(EngineNotReadyError):
        await collect(client, make_request())
    health = client.health()
    assert health.alive and not health.ready
    await client.close()


@pytest.mark.parametrize(
    "model, message", [("broken", "the weights are broken"), ("crash-at-load", "crash|ended")]
)
async def test_failed_start_says_why(kind: str, model: str, message: str) -> None:
    client = build(kind, model)
    await client.start()
    with pytest.raises(StartupError, match=message):
        await client.wait_ready()
    async with asyncio.timeout(5):
        while client.health().alive:
            await asyncio.sleep(0.01)
    await client.close()
