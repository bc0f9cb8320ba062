"""Test three engines behind one client, with a fake core in each: they die, hang and leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.errors import ConfigurationError, EngineNotReadyError, StartupError
from quire.engine.fleet import directory
from quire.engine.fleet.directory import LocalEngines, divide
from quire.engine.fleet.fleet_client import FleetClient, summed
from quire.engine.outputs import SequenceOutput, TierStats
from quire.engine.process import process_client
from quire.engine.process.process_client import ProcessEngineClient
from quire.engine.process.stream import MAX_DEATHS

from .. import fakes
from ..clients import Observer, collect, tokens_of
from ..fakes import EXIT, SLOW, expected_tokens, make_request

COUNT = 3


@pytest.fixture
async def fleet(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FleetClient]:
    monkeypatch.setenv("PYTHONPATH", str(Path(fakes.__file__).parent))
    monkeypatch.setattr(process_client, "FIRST_DELAY_SECONDS", 0.5)
    monkeypatch.setattr(directory.os, "sched_getaffinity", lambda pid: range(COUNT))
    fleet = FleetClient(LocalEngines(EngineConfig(model="fake"), COUNT, make, lambda _: Observer()))
    await fleet.start()
    await fleet.wait_ready()
    try:
        yield fleet
    finally:
        await fleet.close()


def make(config: EngineConfig, **fields: object) -> ProcessEngineClient:
    core, stall = "fakes:build_core", 0.8
    return ProcessEngineClient(config, core=core, stall_timeout=stall, **fields)  # type: ignore[arg-type]


def pid_of(fleet: FleetClient, name: str) -> int:
    member = fleet.supervised[int(name)]
    assert member._engine is not None
    return member._engine.pid


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def check(request: fakes.Request, outputs: list[SequenceOutput]) -> None:
    """Check that each choice got its tokens once, and one end."""
    n = request.sampling_params.n
    for choice in range(n):
        assert tokens_of(outputs, choice) == expected_tokens(request, choice)
    assert [output.finish_reason for output in outputs].count("length") == n
    assert {output.request_id for output in outputs} == {request.request_id}


async def test_requests_spread_and_all_engines_are_seen(fleet: FleetClient) -> None:
    requests = [make_request(SLOW, max_tokens=20, n=2) for _ in range(9)]
    tasks = [asyncio.create_task(collect(fleet, request)) for request in requests]
    await asyncio.sleep(0.1)
    engines = [fleet.engine_of(request.request_id) for request in requests]
    assert set(engines) == {"0", "1", "2"}
    await until(lambda: (stats := fleet.stats()) is not None and stats.num_running == 18)
    for request, task in zip(requests, tasks, strict=True):
        check(request, await task)
    assert fleet.engine_of(requests[0].request_id) is None
    await fleet.reset_prefix_cache()
    await until(lambda: (stats := fleet.stats()) is not None and stats.preemptions == COUNT)
    assert fleet.health().ready and list(fleet.engines()) == ["0", "1", "2"]
    assert fleet.info.num_blocks == 1000


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_streams_go_on_at_another_engine(fleet: FleetClient, how: signal.Signals) -> None:
    """An engine that is stopped is found by its silence; nothing that it says later counts."""
    requests = [make_request(SLOW, max_tokens=100, n=1 + i % 2) for i in range(6)]
    tasks = [asyncio.create_task(collect(fleet, request)) for request in requests]
    await asyncio.sleep(0.2)
    victim = fleet.engine_of(requests[0].request_id)
    assert victim is not None
    pid = pid_of(fleet, victim)
    os.kill(pid, how)
    late = make_request(SLOW, max_tokens=5)
    await until(lambda: fleet.engine_of(requests[0].request_id) != victim)
    health = fleet.health()
    assert health.ready and health.alive and f"engine {victim}" in health.reason
    check(late, await collect(fleet, late))
    if how is signal.SIGSTOP:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    for request, task in zip(requests, tasks, strict=True):
        check(request, await task)
    await until(lambda: len(fleet._ready()) == COUNT)
    assert fleet.health().restarts == 1


async def test_a_request_that_kills_engines_ends_and_its_neighbours_go_on(
    fleet: FleetClient, caplog: pytest.LogCaptureFixture
) -> None:
    neighbours = [make_request(SLOW, max_tokens=150) for _ in range(6)]
    tasks = [asyncio.create_task(collect(fleet, request)) for request in neighbours]
    await asyncio.sleep(0.1)
    poison = make_request(EXIT)
    (output,) = await asyncio.wait_for(collect(fleet, poison), 20)
    assert output.error is not None and output.error.code == "engine_dead"
    assert poison.request_id in output.error.message and poison.request_id in caplog.text
    for request, task in zip(neighbours, tasks, strict=True):
        check(request, await task)
    await until(lambda: len(fleet._ready()) == COUNT)
    assert fleet.health().restarts == MAX_DEATHS + 1


async def test_an_abort_and_a_disconnect_while_no_engine_serves(fleet: FleetClient) -> None:
    aborted, closed = (make_request(SLOW, max_tokens=10_000, n=2) for _ in range(2))
    tasks = [asyncio.create_task(collect(fleet, request)) for request in (aborted, closed)]
    await asyncio.sleep(0.1)
    for name in fleet.members:
        os.kill(pid_of(fleet, name), signal.SIGKILL)
    await until(lambda: not fleet.health().ready)
    assert fleet.health().alive
    with pytest.raises(EngineNotReadyError, match="engine 0"):
        await collect(fleet, make_request())
    fleet.abort(aborted.request_id)
    outputs = await tasks[0]
    assert [output.finish_reason for output in outputs].count("abort") == 2
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    assert len(fleet._streams) == 0
    await until(lambda: fleet.health().ready)
    await asyncio.sleep(0.1)
    stats = fleet.stats()
    assert stats is not None and stats.num_running == 0


async def test_queued_requests_of_an_engine_that_dies_go_on(fleet: FleetClient) -> None:
    """An engine that stands still has not begun them, so they are under no suspicion."""
    for name in fleet.members:
        os.kill(pid_of(fleet, name), signal.SIGSTOP)
    requests = [make_request(max_tokens=5) for _ in range(6)]
    tasks = [asyncio.create_task(collect(fleet, request)) for request in requests]
    await asyncio.sleep(0.1)
    for name in fleet.members:
        os.kill(pid_of(fleet, name), signal.SIGKILL)
    for request, task in zip(requests, tasks, strict=True):
        check(request, await asyncio.wait_for(task, 20))
    assert fleet.health().restarts == COUNT


async def test_an_engine_that_cannot_start_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(fakes.__file__).parent))
    monkeypatch.setattr(directory.os, "sched_getaffinity", lambda pid: range(2))
    config = EngineConfig(model="broken")
    fleet = FleetClient(LocalEngines(config, 2, make, lambda _: Observer()))
    await fleet.start()
    with pytest.raises(StartupError, match="the weights are broken"):
        await fleet.wait_ready()
    await fleet.close()


async def test_closing_ends_what_is_open(fleet: FleetClient) -> None:
    task = asyncio.create_task(collect(fleet, make_request(SLOW, max_tokens=10_000)))
    await asyncio.sleep(0.1)
    await fleet.close()
    (*_, last) = await task
    assert last.error is not None and last.error.code == "engine_dead"


def test_processors_and_gpus_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory.os, "sched_getaffinity", lambda pid: range(8))
    config = EngineConfig(model="fake", device="cpu")
    divided, variables = divide(config, 3)
    assert (divided.num_threads, divided.num_peers, variables) == (2, 3, [{}] * 3)
    for threads, count in ((None, 9), (5, 2)):
        with pytest.raises(ConfigurationError, match=r"--data-parallel-size .* CPUs"):
            divide(EngineConfig(model="fake", device="cpu", num_threads=threads), count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab,5")
    config = EngineConfig(model="fake")
    divided, variables = divide(config, 2)
    assert divided == config
    assert variables == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "GPU-ab"}]
    with pytest.raises(ConfigurationError, match="needs 4 GPUs, but there are 3"):
        divide(config, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    _, variables = divide(EngineConfig(model="fake", tensor_parallel_size=2), 2)
    assert variables == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    with pytest.raises(ConfigurationError, match="not with --nnodes"):
        divide(EngineConfig(model="fake", tensor_parallel_size=2, nnodes=2), 2)


def test_statistics_are_added() -> None:
    stats = fakes.FakeCore(EngineConfig(model="fake")).stats()
    host, disk = TierStats("host", 1, 5, 10, 2, 3, 4, 0), TierStats("disk", 6, None, 10, 7, 8, 0, 9)
    one = stats._replace(
        running_adapters=["b", "a"], accepted_per_position=(2, 1), tiers=[host, disk]
    )
    two = stats._replace(running_adapters=["c", "a"], accepted_per_position=(3,), tiers=[host])
    both = summed([one, two])
    assert both.num_blocks == 2000 and both.kv_usage == 0.0
    assert both.running_adapters == ["a", "b", "c"] and both.accepted_per_position == (5, 1)
    assert both.tiers == [TierStats("host", 2, 10, 10, 4, 6, 8, 0), disk]
