"""The Serve application: Front replicas, which speak HTTP, and Engine replicas, which own engines.

    client ─▶ Serve's proxy ─▶ Front (the whole HTTP application) ══ tcp, CURVE ══▶ engine process
                                  └── describe, through Ray ──▶ Engine (actor) ── owns ──┘

`quire deploy` runs it, and so does a file for `serve deploy` that names `build`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle

from ...engine.errors import StartupError
from ...engine.process.process_client import REAL_CORE, ProcessEngineClient
from ..logs import configure_logging
from ..metrics.metrics import Metrics
from ..serving.http_server import build_app
from ..serving.main import check_model_files
from ..settings import Settings, load_settings
from .engine_owner import Described, EngineOwner
from .options import DeployOptions, as_arguments, check_resources, engine_cpus, read_flags
from .serve_engines import ServeEngines, ServeFleet

ANSWER_SECONDS = 5.0
"""Time that the engines' owners get to say where their engines are."""
UNLISTED_SECONDS = 30.0
"""Time that Serve leaves its proxies to forget a front, by default, before the front drains."""
STOP_SECONDS = 15.0
"""Time beyond the drain that a replica gets to end."""


class Engine:
    """A replica that owns an engine's process. Serve calls its methods."""

    _owner: EngineOwner | None = None

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, values: dict[str, Any], core: str, num_threads: int | None, num_peers: int
    ) -> None:
        settings = load_settings(**values)
        self._drain_seconds = settings.shutdown_timeout
        host = ray.util.get_node_ip_address()
        try:
            # Reading files takes time, and this loop also answers Serve.
            await asyncio.to_thread(check_model_files, settings)
            config = settings.engine_config()
            # Ray sets OMP_NUM_THREADS, in its own way, so the engine is told its threads.
            threads = config.num_threads or num_threads
            config = replace(config, num_threads=threads, num_peers=num_peers)
            make = partial(
                ProcessEngineClient,
                stall_timeout=settings.engine_stall_timeout,
                log_level=settings.log_level,
                log_format="json",
                core=core,
            )
            owner = EngineOwner(config, host, make)
            await owner.start()
        except StartupError as error:
            raise RuntimeError(f"{FAILED} {host}: {error.message}") from None
        self._owner = owner

    async def describe(self, client_key: str) -> Described:
        """Let in a front's client, and say where the engine is."""
        assert self._owner is not None
        return self._owner.describe(client_key)

    async def check_health(self) -> None:
        """Raise if another replica has to take this one's place."""
        assert self._owner is not None
        self._owner.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the engine's load, for `policy.WaitPolicy`."""
        assert self._owner is not None
        return self._owner.load()

    async def __del__(self) -> None:
        """Drain: Serve has told the fronts by now that the engine is leaving."""
        if self._owner is not None:  # it has started
            await self._owner.drain(self._drain_seconds)


@serve.ingress(None)
class Front:
    """A replica that serves HTTP: the application of `quire serve`, with all engines behind it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engines: DeploymentHandle, values: dict[str, Any]
    ) -> None:
        settings = load_settings(**values)
        configure_logging(settings.log_level, "json")
        # Each engine has series of its own, whose sums have no label for it.
        metrics = Metrics(settings.served_names[0], settings.metrics_prefix, None)

        async def ask(client_key: str) -> list[object]:
            answers = engines.broadcast("describe", client_key)
            results: list[object] = await answers.results_async(
                timeout_s=ANSWER_SECONDS, return_exceptions=True
            )
            return results

        directory = ServeEngines(ask, settings.model_path, metrics.observer_of)
        self._fleet = ServeFleet(directory)
        try:
            self._app = await asyncio.to_thread(build_app, settings, self._fleet, metrics)
        except StartupError as error:
            host = ray.util.get_node_ip_address()
            raise RuntimeError(f"{FAILED} {host}: {error.message}") from None
        await self._fleet.start()
        # Serve sends requests to a front only when it can serve them.
        await self._fleet.wait_joined()

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application, whose lifespan ends the fleet's links. Serve asks for it."""
        return self._app


FAILED = "quire cannot start on node"
"""How the error of a replica that cannot start begins; the node's address and the reason follow."""


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application for these arguments: fields of DeployOptions, and settings of `quire
    serve`. Raises ConfigurationError."""
    return make_application(*read_flags(args))


def make_application(
    options: DeployOptions, settings: Settings, core: str = REAL_CORE
) -> serve.Application:
    """Return the application. `core` is what engine processes step; tests pass a fake.

    Raises ConfigurationError if the cluster has too little for the fewest engines.
    """
    values = as_arguments(DeployOptions(), settings, secrets=True)
    del values["replicas"]
    config = settings.engine_config()
    cluster = ray.cluster_resources() if ray.is_initialized() else {}
    needs_gpu = config.device == "cuda" or (config.device == "auto" and bool(cluster.get("GPU")))
    gpus = settings.engine_config().tensor_parallel_size if needs_gpu else 0
    cpus = engine_cpus(options, config.num_threads, needs_gpu, cluster.get("CPU", 0.0))
    least = {
        "CPU": cpus * options.min_replicas + options.front_cpus * options.fronts,
        "GPU": float(gpus * options.min_replicas),
    }
    check_resources(options, least, cluster)
    drain = settings.shutdown_timeout + STOP_SECONDS
    number: dict[str, Any] = {"num_replicas": options.min_replicas}
    if options.max_replicas > options.min_replicas:
        number = {"autoscaling_config": _autoscaling(options)}
    engine = serve.deployment(Engine, name="Engine").options(
        **number,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=drain,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        logging_config={"enable_access_log": False},  # each `describe` would be a line
    )
    front = serve.deployment(Front, name="Front").options(
        num_replicas=options.fronts,
        ray_actor_options={"num_cpus": options.front_cpus},
        max_ongoing_requests=100_000,  # the limits are quire's own
        logging_config={"enable_access_log": False},  # it is quire's own, if asked for
        graceful_shutdown_timeout_s=drain + UNLISTED_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
    )
    threads = None if needs_gpu else max(1, int(cpus))
    nodes = [one for one in ray.nodes() if one["Alive"]] if cluster else []
    peers = -(-options.max_replicas // max(len(nodes), 1))
    return front.bind(engine.bind(values, core, threads, peers), values)


def _autoscaling(options: DeployOptions) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas,
        initial_replicas=options.min_replicas,
        upscale_delay_s=options.scale_up_delay,
        downscale_delay_s=options.scale_down_delay,
        look_back_period_s=10,
        policy={
            "policy_function": "quire.server.ray_app.policy:WaitPolicy",
            "policy_kwargs": {"target_wait": options.target_wait},
        },
    )
