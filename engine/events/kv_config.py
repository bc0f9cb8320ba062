"""What `--kv-events-config` says: whether and where the engine publishes its block events.

The flag and its fields are those of vLLM's KVEventsConfig, so that one configuration fits both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from ..errors import ConfigurationError

EventEncoding = Literal["map", "array"]
"""Each event by the names of its fields, as vLLM publishes since version 0.24, or as the list of
their values, as it did before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventsConfig:
    """Where block events are published, in ZeroMQ's terms.

    An `endpoint` with `*` or `::`, or of ipc, is bound, and any other one is connected to.
    `replay_endpoint` answers requests for the last `buffer_steps` batches. Beyond `hwm` batches
    that a subscriber has not taken, it misses the next ones. `topic` is the first frame of each.
    """

    enable_kv_cache_events: bool = False
    publisher: Literal["zmq", "null"] | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    """Accepted because vLLM has it. Nothing is queued here: a batch is published by the step that
    makes it."""
    topic: str = ""
    encoding: EventEncoding = "map"
    rank: int = 0
    """The engine's number among those that run side by side, which the server sets."""

    @property
    def is_on(self) -> bool:
        """Whether anything is published."""
        return self.enable_kv_cache_events and self.publisher != "null"

    @property
    def own_endpoint(self) -> str:
        """The endpoint of the engine with this rank: its TCP port is as much higher, as in vLLM."""
        return _of_rank(self.endpoint, self.rank)

    @property
    def own_replay_endpoint(self) -> str | None:
        """The replay endpoint of the engine with this rank, likewise."""
        return self.replay_endpoint and _of_rank(self.replay_endpoint, self.rank)


def kv_events_of_rank(text: str | None, rank: int) -> str | None:
    """Return the JSON for the engine with this number, counted from 0, among those side by side."""
    return None if text is None else json.dumps({**json.loads(text), "rank": rank})


def read_kv_events(text: str | None) -> KVEventsConfig:
    """Read the JSON of `--kv-events-config`; without it nothing is published. Raises
    ConfigurationError."""
    if text is None:
        return KVEventsConfig()
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"kv_events_config is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError("kv_events_config must be a JSON object")
    types = get_type_hints(KVEventsConfig)
    for name, value in values.items():
        if name not in types:
            known = ", ".join(types)
            raise ConfigurationError(f"kv_events_config has no field {name!r}: choose from {known}")
        _check(name, value, types[name])
    return KVEventsConfig(**values)


def _check(name: str, value: Any, kind: Any) -> None:
    """Raise ConfigurationError if a field cannot have this value."""
    if kind is bool and not isinstance(value, bool):
        problem = "must be true or false"
    elif kind is int and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        problem = "must be an integer of at least 0"
    elif name == "publisher" and value not in ("zmq", "null", None):
        problem = "must be zmq or null"
    elif name == "encoding" and value not in get_args(EventEncoding):
        problem = f"must be one of {', '.join(get_args(EventEncoding))}"
    elif name == "topic" and not isinstance(value, str):
        problem = "must be a string"
    elif name.endswith("endpoint") and not (
        (value is None and name == "replay_endpoint") or _is_endpoint(value)
    ):
        problem = "must be an address of ZeroMQ, such as tcp://*:5557 or ipc:///run/kv-events"
    else:
        return
    raise ConfigurationError(f"kv_events_config: {name} {problem}, not {json.dumps(value)}")


def _is_endpoint(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    scheme, _, rest = value.partition("://")
    if scheme == "ipc":
        return bool(rest)
    port = rest.rpartition(":")[2]
    return scheme == "tcp" and port.isascii() and port.isdigit() and 0 < int(port) < 2**16


def _of_rank(endpoint: str, rank: int) -> str:
    if rank == 0:
        return endpoint
    if endpoint.startswith("ipc://"):
        return f"{endpoint}_dp{rank}"
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + rank}"
