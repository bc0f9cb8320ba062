"""The families of one process's metrics, all with the prefix and the labels of the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Prefix = Literal["quire", "vllm"]
"""What stands before the names of families."""

_Family = TypeVar("_Family", Gauge, Counter)


class Families:
    """Registers families in a registry of its own.

    `prefix` stands before each name, and `labels` are on each sample. A family without further
    labels is registered as its only series.
    """

    def __init__(self, prefix: Prefix, labels: Mapping[str, str]) -> None:
        self.registry = CollectorRegistry()
        self.prefix: Prefix = prefix
        self.labels = dict(labels)

    def gauge(self, name: str, help: str) -> Gauge:
        """Register a gauge."""
        return self.gauge_by(name, help)()

    def counter(self, name: str, help: str) -> Counter:
        """Register a counter."""
        return self.counter_by(name, help)()

    def histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        """Register a histogram."""
        histogram = Histogram(
            f"{self.prefix}:{name}",
            help,
            list(self.labels),
            buckets=buckets,
            registry=self.registry,
        )
        return histogram.labels(**self.labels)

    def gauge_by(self, name: str, help: str, *labels: str) -> Callable[..., Gauge]:
        """Register a gauge with more labels; return a function of their values."""
        return self._by(Gauge, name, help, labels)

    def counter_by(self, name: str, help: str, *labels: str) -> Callable[..., Counter]:
        """Register a counter with more labels; return a function of their values."""
        return self._by(Counter, name, help, labels)

    def _by(
        self, kind: type[_Family], name: str, help: str, labels: Sequence[str]
    ) -> Callable[..., _Family]:
        names = [*self.labels, *labels]
        family = kind(f"{self.prefix}:{name}", help, names, registry=self.registry)
        return lambda *values: family.labels(*self.labels.values(), *values)
