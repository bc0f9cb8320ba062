"""Compare quire's router with those of Ray Serve, over engines that are the same.

    make .venv-ray/.installed && .venv-ray/bin/python -P benchmarks/serve_routing.py

The same requests, at the same times, go to the same number of engines, with caches that hold a part
of the prefixes that are in use:

    power of two   Ray Serve's default: the shorter of two queues
    prefix         Ray Serve's PrefixCacheAffinityRouter, as it is by default
    prefix, 10     the same with imbalanced_threshold 10, as its documentation has it
    quire          the router of --data-parallel-size and quire deploy

Under Ray Serve an engine is a replica of a deployment, and the requests go through a handle. With
quire's router they go to the engines directly. Compare the share of prompt tokens that is found
cached; times to a first token (from sending to the engine's first token, on this machine) have
Serve's own share in them. Two engines on two cores leave nothing for the rest, so repeat it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from statistics import quantiles
from types import ModuleType
from typing import Any, NamedTuple

from quire.engine.config import EngineConfig
from quire.engine.fleet.directory import LocalEngines
from quire.engine.fleet.fleet_client import FleetClient
from quire.engine.process.process_client import ProcessEngineClient
from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams

ROUTER = "PrefixCacheAffinityRouter"
MODULES = ("routing_policies", "request_router")
"""Where Ray has had the router."""
VOCAB = range(100, 1500)


class Ask(NamedTuple):
    """A request. Ray's router compares `prompt` character by character."""

    prompt: str
    token_ids: list[int]
    output_len: int
    arrival: float
    number: int


class Answer(NamedTuple):
    """What came of a request: cached tokens of its prompt, and when its first token came."""

    cached: int
    first_token_at: float


Send = Callable[[Ask], Awaitable[Answer]]


def make_asks(options: argparse.Namespace) -> list[Ask]:
    """Return requests that begin with one of a few prefixes, the first ones more often."""
    rng = random.Random(options.seed)
    prefixes = [rng.choices(VOCAB, k=options.prefix_len) for _ in range(options.prefixes)]
    weights = [1 / (1 + index) ** 0.5 for index in range(options.prefixes)]
    asks, at = [], 0.0
    for number in range(options.requests):
        [prefix] = rng.choices(prefixes, weights)
        token_ids = prefix + rng.choices(VOCAB, k=rng.randrange(16, 64))
        text = " ".join(map(str, token_ids))
        asks.append(Ask(text, token_ids, options.output_len, at, number))
        at += rng.expovariate(options.rate)
    return asks


async def answer(engine: Any, ask: Ask) -> Answer:
    """Let an engine client serve a request."""
    params = SamplingParams(max_tokens=ask.output_len, temperature=0.0, ignore_eos=True)
    request = Request(
        request_id=f"{ask.number}",
        prompt_token_ids=tuple(ask.token_ids),
        sampling_params=params,
        arrival_time=time.monotonic(),
    )
    cached, first = 0, None
    async for output in engine.generate(request):
        if first is None and output.token_ids:
            first = time.monotonic()
        if output.num_cached_tokens is not None:
            cached = output.num_cached_tokens
        assert output.error is None, output.error
    assert first is not None
    return Answer(cached, first)


async def measure(name: str, asks: list[Ask], send: Send) -> None:
    """Send the requests at their times and print a line."""
    begin = time.monotonic()

    async def one(ask: Ask) -> tuple[int, float]:
        await asyncio.sleep(begin + ask.arrival - time.monotonic())
        sent = time.monotonic()
        got = await send(ask)
        return got.cached, got.first_token_at - sent

    results = await asyncio.gather(*(one(ask) for ask in asks))
    seconds = time.monotonic() - begin
    cached = sum(tokens for tokens, _ in results)
    total = sum(len(ask.token_ids) for ask in asks)
    cuts = quantiles((time * 1e3 for _, time in results), n=100, method="inclusive")
    print(
        f"{name:14} {cached / total:7.1%} cached   first token {cuts[49]:6.0f} ms (p50) "
        f"{cuts[89]:6.0f} ms (p90)   {len(asks) / seconds:5.1f} requests/s",
        flush=True,
    )


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """Return the configuration of each engine."""
    return EngineConfig(
        model=options.model or str(files("quire.configs") / "demo"),
        device="cpu",
        num_blocks=options.num_blocks,
        max_model_len=1024,
        num_threads=1,
        speculation="off",
    )


async def run_quire(options: argparse.Namespace, asks: list[Ask]) -> None:
    """Measure quire's own router."""
    engines = LocalEngines(
        engine_config(options), options.engines, ProcessEngineClient, lambda _: None
    )
    fleet = FleetClient(engines)
    await fleet.start()
    try:
        await fleet.wait_ready()
        await measure("quire", asks, lambda ask: answer(fleet, ask))
    finally:
        await fleet.close()


def prefix_router() -> Any:
    """Return Ray's router that knows prefixes. Its package wants the engines that it was made for
    to be installed; the router itself needs none of them, so it is loaded without the package's own
    beginning. Raises ImportError."""
    import ray

    name = "ray.llm._internal.serve"
    if name not in sys.modules:
        stub = ModuleType(name)
        stub.__path__ = [os.path.join(os.path.dirname(ray.__file__), "llm/_internal/serve")]
        sys.modules[name] = stub
    for module in MODULES:
        path = f"{name}.{module}.prefix_aware"
        try:
            router = importlib.import_module(f"{path}.prefix_aware_router")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(f"{name}.{module}"):
                raise
            continue
        # Its actor runs where the stub is not, so the code goes along.
        ray.cloudpickle.register_pickle_by_value(importlib.import_module(f"{path}.prefix_tree"))
        ray.cloudpickle.register_pickle_by_value(router)
        return getattr(router, ROUTER)
    raise ImportError(f"this version of Ray has no {ROUTER} where it is known to be")


class Replica:
    """An engine as a replica of a deployment."""

    async def __init__(self, config: EngineConfig) -> None:
        self._engine = ProcessEngineClient(config)
        await self._engine.start()
        await self._engine.wait_ready()

    async def __call__(self, ask: Ask) -> Answer:
        return await answer(self._engine, ask)


def run_serve(options: argparse.Namespace, asks: list[Ask], name: str, router: Any) -> None:
    """Measure a router of Ray Serve; None is its default."""
    from ray import serve

    arguments: dict[str, Any] = {
        "num_replicas": options.engines,
        "max_ongoing_requests": 1000,
        "ray_actor_options": {"num_cpus": 0.1},
    }
    if router is not None:
        arguments["request_router_config"] = router
    bound = serve.deployment(**arguments)(Replica).bind(engine_config(options))
    application = f"routing {name}"
    handle = serve.run(bound, name=application, route_prefix=None)
    try:
        asyncio.run(measure(name, asks, lambda ask: handle.remote(ask)))
    finally:
        serve.delete(application)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--prefixes", type=int, default=16)
    parser.add_argument("--prefix-len", type=int, default=384)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--rate", type=float, default=8.0, help="requests/s")
    parser.add_argument("--num-blocks", type=int, default=260, help="of each engine's cache")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    asks = make_asks(options)
    print(
        f"{options.engines} engines of {options.num_blocks} blocks, {options.prefixes} prefixes of "
        f"{options.prefix_len} tokens, {len(asks)} requests at {options.rate:g}/s",
        flush=True,
    )
    asyncio.run(run_quire(options, asks))
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    ray.init(num_cpus=options.engines + 2, log_to_driver=False, include_dashboard=False)
    serve.start(proxy_location="Disabled")
    try:
        run_serve(options, asks, "power of two", None)
        router = prefix_router()
        for name, arguments in (("prefix", {}), ("prefix, 10", {"imbalanced_threshold": 10})):
            config = RequestRouterConfig(
                request_router_class=router, request_router_kwargs=arguments
            )
            run_serve(options, asks, name, config)
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
