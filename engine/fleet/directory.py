"""Where the engines of a fleet are, and who starts them."""

from __future__ import annotations

import os
from collections import abc
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..config import EngineConfig
from ..errors import ConfigurationError
from ..events.kv_config import kv_events_of_rank
from ..process.attached_client import AttachedEngineClient
from ..process.process_client import ProcessEngineClient
from ..process.remote_client import EngineObserver, RemoteEngineClient
from ..process.streams import StreamTable

Observers = abc.Callable[[str], EngineObserver]
"""Returns the observer of the engine of this name."""


class Directory(Protocol):
    """Knows the engines of a fleet. A fleet asks it once, and sees from each link whether its
    engine lives."""

    def connect(self, streams: StreamTable) -> abc.Mapping[str, RemoteEngineClient]:
        """Return a link to each engine by its name. Their streams are those of the table."""


class LocalEngines:
    """Engines that this process starts and supervises, on one machine.

    GPU engines get one device each. CPU engines share the processors and the main memory: each gets
    an equal part of them.
    """

    def __init__(
        self,
        config: EngineConfig,
        count: int,
        make: abc.Callable[..., ProcessEngineClient],
        observers: Observers,
    ) -> None:
        """`make` makes the client of one engine, as `ProcessEngineClient` does. Raises
        ConfigurationError if there are too few devices or processors."""
        self._make = make
        self._observers = observers
        self._config, self._environments = divide(config, count)

    def connect(self, streams: StreamTable) -> dict[str, ProcessEngineClient]:
        return {
            str(index): self._make(
                replace(
                    self._config,
                    kv_events_config=kv_events_of_rank(self._config.kv_events_config, index),
                ),
                observer=self._observers(str(index)),
                streams=streams,
                environment=environment,
            )
            for index, environment in enumerate(self._environments)
        }


class AttachedEngines:
    """Engines that another process of this machine supervises. `name` is that of the client, unique
    among all that the engines ever have."""

    def __init__(self, count: int, name: bytes, observers: Observers) -> None:
        self._count = count
        self.links: list[AttachedEngineClient] = []
        """The links, once they have been made; whoever hears from the supervisor tells them."""
        self._name = name
        self._observers = observers

    def connect(self, streams: StreamTable) -> dict[str, AttachedEngineClient]:
        self.links = [
            AttachedEngineClient(self._name, observer=self._observers(str(index)), streams=streams)
            for index in range(self._count)
        ]
        return {str(index): link for index, link in enumerate(self.links)}


def divide(config: EngineConfig, count: int) -> tuple[EngineConfig, list[dict[str, str]]]:
    """Return the configuration of each of `count` engines, and what their environments add.

    Raises ConfigurationError if the machine has too few GPUs or processors.
    """
    if config.nnodes > 1:
        raise ConfigurationError("--data-parallel-size works on one host, not with --nnodes")
    ranks = config.num_ranks
    devices = [] if config.device == "cpu" else visible_gpus()
    if devices or config.device == "cuda":
        if count * ranks > len(devices):
            raise ConfigurationError(
                f"--data-parallel-size {count} needs {count * ranks} GPUs, but there are "
                f"{len(devices)}"
            )
        shares = [",".join(devices[at : at + ranks]) for at in range(0, count * ranks, ranks)]
        return config, [{"CUDA_VISIBLE_DEVICES": share} for share in shares]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = config.num_threads or (usable or 1) // (count * ranks)
    needed = max(threads, 1) * count * ranks
    if needed > (usable or 1):
        raise ConfigurationError(
            f"--data-parallel-size {count} needs {needed} CPUs, but this process may use only "
            f"{usable}"
        )
    return replace(config, num_threads=threads, num_peers=count), [{} for _ in range(count)]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. It asks
    NVIDIA's driver, without loading CUDA."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device.strip() for device in chosen.split(",") if device.strip() not in ("", "-1")]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(index) for index in range(len(list(folder.iterdir())))] if folder.is_dir() else []
