"""Check `quire deploy` on a Ray cluster of two nodes on this machine, with the demo model.

`make test-ray` runs it, in an environment that has Ray. Each test deploys what it needs.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

os.environ |= {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}

import ray
from ray import serve
from ray.cluster_utils import Cluster

from quire.server.ray_app.application import make_application
from quire.server.ray_app.command import NAME
from quire.server.ray_app.options import read_flags

KEY = "a key of the test"
MODEL = "quire-demo"
PROMPTS = ["What is a KV block?", "Once upon a time", "How does quire", "A token is"]
LENGTH = 300
HEADERS = {"Authorization": f"Bearer {KEY}"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


PORT = free_port()
ADDRESS = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
    began = psutil.Process().children(recursive=True)
    assert len(ray.nodes()) == 2 and began
    try:
        yield cluster
        serve.shutdown()
        until(lambda: not engines() and not replicas("Front"), 60)
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
    until(lambda: not psutil.Process().children(recursive=True), 30)


def deploy(**flags: Any) -> None:
    """Deploy with these flags, and return when all of it serves."""
    defaults = {"engine_cpus": 0.1, "front_cpus": 0.1, "num_threads": 1, "api_key": [KEY]}
    defaults |= {"shutdown_timeout": 20.0, "log_level": "warning"}
    application = make_application(*read_flags(defaults | flags))
    serve.run(application, name=NAME, route_prefix="/")
    until(lambda: httpx.get(f"{ADDRESS}/ready").status_code == 200, 60)


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.2)


def command_of(process: psutil.Process) -> list[str]:
    """Return the words of a process's command; none of one that has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def replicas(name: str) -> list[psutil.Process]:
    """Return the actors' processes of a deployment."""
    title = f"ray::ServeReplica:{NAME}:{name}"
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if any(word.startswith(title) for word in command_of(process))
    ]


def engines() -> list[psutil.Process]:
    """Return the engines' processes, which actors have started."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "quire.engine.process.engine_process" in command_of(process)
    ]


def num_running() -> float:
    """Return how many sequences the engines run, as a front's metrics say."""
    text = httpx.get(f"{ADDRESS}/metrics", timeout=10).text
    (line,) = re.findall(r"^quire:num_requests_running{model_name=.*$", text, re.M)
    return float(line.rpartition(" ")[2])


async def stream(
    client: httpx.AsyncClient,
    prompt: str,
    first: asyncio.Event | None = None,
    length: int = LENGTH,
) -> str:
    """Return the text of a streamed answer; `first` is set when it has begun."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": length, "seed": 7, "temperature": 1}
    body |= {"ignore_eos": True, "stream": True}
    pieces = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, (answer.status_code, await answer.aread())
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                pieces += [choice["text"] for choice in event["choices"]]
                if first is not None and len(pieces) > 5:
                    first.set()
    assert line == "" or line == "data: [DONE]"
    return "".join(pieces)


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=ADDRESS, headers=HEADERS, timeout=120)


async def references() -> dict[str, str]:
    async with client() as http:
        return {prompt: await stream(http, prompt) for prompt in PROMPTS}


async def test_answers_stream_and_no_port_is_without_a_key() -> None:
    deploy(replicas="1")
    texts = await references()
    assert all(len(text) > LENGTH / 2 for text in texts.values())
    assert await references() == texts
    # A client that leaves in the middle is noticed by the engine.
    task = asyncio.create_task(stream(client(), PROMPTS[0], begun := asyncio.Event(), 3000))
    await begun.wait()
    assert num_running() == 1
    task.cancel()
    await asyncio.wait({task})
    await asyncio.to_thread(until, lambda: num_running() == 0, 2)
    # Serve's proxy is one door, and the ports of the fronts, on which it reaches them, are others.
    ports = {PORT}
    for front in replicas("Front"):
        connections = front.net_connections(kind="tcp")
        ports |= {one.laddr.port for one in connections if one.status == "LISTEN"}
    tried = 0
    for port in ports:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5)
        except httpx.HTTPError:
            continue  # a port of Ray's own, which does not speak HTTP
        tried += 1
        assert answer.status_code == 401, (port, answer.text)
        headers = {"Authorization": "Bearer wrong"}
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=headers, timeout=5)
        assert answer.status_code == 401
    assert tried >= 2


@pytest.mark.parametrize("victim", ["engine", "actor"])
async def test_a_kill_under_load_loses_nothing(victim: str) -> None:
    deploy(replicas="2")
    texts = await references()
    async with client() as http:
        begun = [asyncio.Event() for _ in range(12)]
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(begun))]
        pairs = zip(prompts, begun, strict=True)
        tasks = [asyncio.create_task(stream(http, *pair)) for pair in pairs]
        await asyncio.gather(*(asyncio.wait_for(event.wait(), 60) for event in begun))
        before = engines()
        assert len(before) == 2
        for process in before[:1]:
            (process if victim == "engine" else process.parent()).send_signal(signal.SIGKILL)
        assert not any(task.done() for task in tasks)
        assert dict(zip(prompts, await asyncio.gather(*tasks), strict=True)) == texts
    until(lambda: len(engines()) == 2 and before[0] not in engines())


async def test_a_rolling_update_under_load_loses_nothing() -> None:
    deploy(replicas="2", fronts=2)
    texts = await references()
    before = set(engines())
    done = asyncio.Event()

    async def work(index: int) -> int:
        count = 0
        async with client() as http:
            while not done.is_set():
                prompt = PROMPTS[(index + count) % len(PROMPTS)]
                assert await stream(http, prompt) == texts[prompt]
                count += 1
        return count

    tasks = [asyncio.create_task(work(index)) for index in range(4)]
    await asyncio.sleep(1)
    update = asyncio.create_task(asyncio.to_thread(deploy, replicas="2", fronts=2, max_num_seqs=64))
    await asyncio.wait({update, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    done.set()
    assert all(count > 0 for count in await asyncio.gather(*tasks))
    await update
    until(lambda: len(engines()) == 2)
    assert not before & set(engines())


async def test_the_load_decides_on_the_number_of_engines() -> None:
    flags = {"target_wait": 0.02, "scale_up_delay": 1.0, "scale_down_delay": 3.0}
    deploy(replicas="1:3", **flags)
    done = asyncio.Event()

    async def work(index: int) -> None:
        async with client() as http:
            while not done.is_set():
                text = f"{index} {time.monotonic()} " + "all work and no play " * 40
                body = {"model": MODEL, "prompt": text, "max_tokens": 4}
                answer = await http.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text

    tasks = [asyncio.create_task(work(index)) for index in range(24)]
    try:
        await asyncio.to_thread(until, lambda: len(engines()) == 3, 150)
    finally:
        done.set()
        await asyncio.gather(*tasks)
    await asyncio.to_thread(until, lambda: len(engines()) == 1, 150)
    assert httpx.get(f"{ADDRESS}/ready").status_code == 200


async def test_the_printed_configuration_can_be_deployed() -> None:
    command = [sys.executable, "-P", "-m", "quire.server.cli", "deploy", "--print"]
    command += ["--engine-cpus", "0.1", "--front-cpus", "0.1", "--served-model-name", "printed"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (application,) = yaml.safe_load(printed)["applications"]
    module, _, name = application["import_path"].partition(":")
    build = getattr(importlib.import_module(module), name)
    serve.run(build(application["args"]), name=application["name"], route_prefix="/")
    body = {"model": "printed", "prompt": "What is a", "max_tokens": 5}
    answer = httpx.post(f"{ADDRESS}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """The node and the reason are named, and nothing stays deployed."""
    serve.delete(NAME)
    command = [sys.executable, "-P", "-m", "quire.server.cli", "deploy", str(tmp_path / "nothing")]
    command += ["--port", str(free_port()), "--ray-address", ray.get_runtime_context().gcs_address]
    command += ["--engine-cpus", "0.1", "--front-cpus", "0.1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1, result.stderr
    assert "nothing" in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("quire: ")
    assert "on node" in result.stderr.splitlines()[-1]
    assert NAME not in serve.status().applications
