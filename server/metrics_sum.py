"""The metrics of several processes as one page.

Counters and histograms add up; gauges are those of the process that renders, the only one that
watches the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample as PrometheusSample

_ADDED = ("counter", "histogram")


class Key(NamedTuple):
    family: str
    name: str
    labels: tuple[tuple[str, str], ...]


class Sample(NamedTuple):
    key: Key
    value: float


Totals = dict[Key, float]
"""In the order in which a page has them."""


def samples_of(families: Iterable[Metric]) -> list[Sample]:
    """All that adds up."""
    return [
        Sample(Key(family.name, sample.name, tuple(sample.labels.items())), sample.value)
        for family in families
        if family.type in _ADDED
        for sample in family.samples
    ]


def add(totals: Totals, samples: Iterable[Sample]) -> None:
    for key, value in samples:
        if key not in totals:
            totals[key] = value
        elif key.name == f"{key.family}_created":  # when it began to count
            totals[key] = min(totals[key], value)
        else:
            totals[key] += value


class Sum(Collector):
    """The families of `own`, with what `others` counted; a family that `own` lacks is left out."""

    def __init__(self, own: Collector, others: Totals) -> None:
        self._own = own
        self._others = others

    def collect(self) -> Iterator[Metric]:
        by_family: dict[str, list[Sample]] = {}
        for key, value in self._others.items():
            by_family.setdefault(key.family, []).append(Sample(key, value))
        for family in self._own.collect():
            if family.type in _ADDED:
                totals: Totals = {}
                add(totals, samples_of([family]))
                add(totals, by_family.get(family.name, ()))
                family.samples = [
                    PrometheusSample(key.name, dict(key.labels), value)
                    for key, value in totals.items()
                ]
            yield family
