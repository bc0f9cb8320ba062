"""What `quire deploy` deploys: from its flags, and as the arguments of the Serve application.

Settings travel as plain values, so that they may stand in a file of `serve deploy`.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...engine.errors import ConfigurationError
from ..settings import Settings, read_settings

SECRETS = ("api_key", "admin_api_key")
"""Settings that `quire deploy --print` leaves out."""

_REFUSED = {
    "uds": "Ray Serve's proxies listen on a port",
    "ssl_keyfile": "end TLS in front of Ray Serve's proxies",
    "http_workers": "use --fronts",
    "data_parallel_size": "use --replicas",
    "lora_dir": "an adapter loaded into some engines would be missing in later ones; use --lora",
    "kv_events_config": "several engines on a machine cannot publish at one address",
}
"""Settings of `quire serve` that a deployment does not have, and what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployOptions:
    """How many engines and fronts there are, and what each of them takes of a machine.

    `engine_cpus` is what Ray reserves for an engine; None divides the cluster's. Delays are those
    before the number of engines is changed, in seconds.
    """

    replicas: str = "1"
    fronts: int = 1
    engine_cpus: float | None = None
    front_cpus: float = 1.0
    target_wait: float = 2.0
    scale_up_delay: float = 10.0
    scale_down_delay: float = 300.0

    def __post_init__(self) -> None:
        bounds = re.fullmatch(r"([0-9]{1,4})(?::([0-9]{1,4}))?", self.replicas)
        if bounds is None or not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigurationError(
                f"--replicas {self.replicas} is neither a number from 1 on, such as 4, nor a range "
                "of them, such as 2:16"
            )
        least = {"fronts": 1, "target_wait": 0.001}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not least.get(field.name, 0) <= value < math.inf:
                flag = "--" + field.name.replace("_", "-")
                raise ConfigurationError(f"{flag} {value} is too small, or not finite")

    @property
    def min_replicas(self) -> int:
        """The number of engines at least."""
        return int(self.replicas.partition(":")[0])

    @property
    def max_replicas(self) -> int:
        """The number of engines at most."""
        return int(self.replicas.rpartition(":")[2])


HELP = {
    "replicas": "Engines: a number, or a range MIN:MAX in which the load decides.",
    "fronts": "HTTP replicas, each with all engines.",
    "engine_cpus": "CPUs that Ray reserves for an engine. Default: --num-threads, or a share.",
    "front_cpus": "CPUs that Ray reserves for a front.",
    "target_wait": "Seconds of waiting for a first step, above which engines are added.",
    "scale_up_delay": "Seconds for which more engines must be wanted.",
    "scale_down_delay": "Seconds for which fewer engines must be enough.",
}
"""Help of each flag, by its field."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of DeployOptions, and those of the command itself."""
    group = parser.add_argument_group("Deployment")
    defaults = DeployOptions()
    for name, text in HELP.items():
        default = getattr(defaults, name)
        kind: type = str if name == "replicas" else int if name == "fronts" else float
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            metavar="MIN:MAX" if name == "replicas" else "N" if kind is int else "X",
            help=text if default is None else f"{text} (default: {default})",
        )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="Ray cluster to deploy to. Default: RAY_ADDRESS, or one that runs on this machine, or "
        "a local one, which ends with the command.",
    )
    group.add_argument(
        "--print",
        action="store_true",
        help="Print the configuration for `serve deploy` instead of deploying.",
    )


def read_flags(flags: Mapping[str, Any]) -> tuple[DeployOptions, Settings]:
    """Return the deployment and the server's settings of the flags, or of the arguments of an
    application. Raises ConfigurationError."""
    names = {field.name for field in fields(DeployOptions)}
    try:
        options = DeployOptions(**{key: value for key, value in flags.items() if key in names})
    except TypeError as error:
        raise ConfigurationError(f"the options of the deployment are wrong: {error}") from error
    settings = read_settings({key: value for key, value in flags.items() if key not in names})
    for name, advice in _REFUSED.items():
        if getattr(settings, name) != Settings.model_fields[name].default:
            flag = "--" + name.replace("_", "-")
            raise ConfigurationError(f"{flag} does not go with `quire deploy`: {advice}")
    if settings.port == 0:
        raise ConfigurationError("--port 0 does not go with `quire deploy`: name the port")
    settings.engine_config()
    return options, settings


def as_arguments(options: DeployOptions, settings: Settings, *, secrets: bool) -> dict[str, Any]:
    """Return plain values from which `read_flags` makes the same, on any machine."""
    values = settings.model_dump(mode="json", exclude_unset=True)
    values.pop("config", None)  # the file has been read
    if settings.model is not None and Path(settings.model).exists():
        values["model"] = str(Path(settings.model).resolve())
        values.setdefault("served_model_name", [settings.model])
    for name in SECRETS:
        if not secrets:
            values.pop(name, None)
    defaults = DeployOptions()
    chosen = {
        name: value
        for name, value in asdict(options).items()
        if value != getattr(defaults, name) or name == "replicas"
    }
    return values | chosen


def engine_cpus(
    options: DeployOptions, num_threads: int | None, needs_gpu: bool, cluster_cpus: float
) -> float:
    """Return how many CPUs are reserved for an engine: as given, else its threads, else one beside
    a GPU, else an equal share of what the fronts leave of the cluster."""
    if options.engine_cpus is not None:
        return options.engine_cpus
    if num_threads is not None:
        return float(num_threads)
    if needs_gpu:
        return 1.0
    left = cluster_cpus - options.front_cpus * options.fronts
    return float(max(1, int(left / options.max_replicas)))


def check_resources(
    options: DeployOptions, least: Mapping[str, float], cluster: Mapping[str, float]
) -> None:
    """Raise ConfigurationError if a cluster has less than is needed for the fewest engines.

    An unknown cluster, which is empty, is taken to be large enough.
    """
    for name, needed in least.items():
        if cluster and needed > cluster.get(name, 0.0):
            raise ConfigurationError(
                f"--replicas {options.replicas} needs {needed:g} {name}s for {options.min_replicas}"
                f" engines and {options.fronts} fronts, but the cluster has "
                f"{cluster.get(name, 0.0):g}"
            )
