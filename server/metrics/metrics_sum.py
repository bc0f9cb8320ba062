"""Adds up the metrics of several processes for one page.

Counters and histograms are added. Gauges are those of the process that renders the page, which is
the only one that watches the engine. prometheus_client's multiprocess mode is not used: it needs a
directory of files that must be emptied between runs, and it has no custom collectors, such as the
histogram of token latencies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample as PrometheusSample

from ...engine.config import EngineInfo
from ...engine.outputs import EngineStats
from ...engine.process.remote_client import EngineObserver
from .tier_metrics import TIER_FAMILIES

OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
"""The type of a page with exemplars, which Prometheus asks for by itself."""
_ADDED = ("counter", "histogram")


class Key(NamedTuple):
    """Identifies a sample: the name of its metric family, its own name, and its labels."""

    family: str
    name: str
    labels: tuple[tuple[str, str], ...]


class Sample(NamedTuple):
    """A value of a counter or histogram, in a form that can be sent to another process."""

    key: Key
    value: float


Totals = dict[Key, float]
"""Sums by key, in the order of the page."""


def samples_of(families: Iterable[Metric]) -> list[Sample]:
    """Return the samples of all counters and histograms, without their creation times: these would
    be a third of the page, and no one reads them."""
    return [
        Sample(Key(family.name, sample.name, tuple(sample.labels.items())), sample.value)
        for family in families
        if family.type in _ADDED
        for sample in family.samples
        if sample.name != f"{family.name}_created"
    ]


def add(totals: Totals, samples: Iterable[Sample]) -> None:
    """Add the samples to the totals."""
    for key, value in samples:
        totals[key] = totals.get(key, 0.0) + value


class Sum(Collector):
    """Collects the families of `own` with the counts of `others` added, without creation times.

    Exemplars are those of `own`. A family that `own` lacks is left out.
    """

    def __init__(self, own: Collector, others: Totals) -> None:
        self._own = own
        self._others = others

    def collect(self) -> Iterator[Metric]:
        """Yield the families for one page."""
        by_family: dict[str, list[Sample]] = {}
        for key, value in self._others.items():
            by_family.setdefault(key.family, []).append(Sample(key, value))
        for family in self._own.collect():
            if family.type in _ADDED:
                totals: Totals = {}
                add(totals, samples_of([family]))
                add(totals, by_family.get(family.name, ()))
                exemplars = {
                    (sample.name, tuple(sample.labels.items())): sample.exemplar
                    for sample in family.samples
                    if sample.exemplar is not None
                }
                family.samples = [
                    PrometheusSample(
                        *(key.name, dict(key.labels), value, None),
                        exemplars.get((key.name, key.labels)),
                    )
                    for key, value in totals.items()
                ]
            yield family


class Page(NamedTuple):
    """A page of metrics, and its content type."""

    content: bytes
    media_type: str


def page_of(own: Collector, others: Totals, *, openmetrics: bool) -> Page:
    """Return the metrics of `own` with the counts of `others` added: in Prometheus' text format, or
    in that of OpenMetrics, which alone has exemplars."""
    families = Sum(own, others)
    if not openmetrics:
        return Page(generate_latest(families), CONTENT_TYPE_PLAIN_0_0_4)
    # ALLOWUTF8 alone keeps the colon of the names.
    content = generate_openmetrics(families, ALLOWUTF8)  # type: ignore[no-untyped-call]
    return Page(content, OPENMETRICS_TYPE)


ENGINE_FAMILIES = frozenset(
    (
        *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason"),
        *("kv_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits"),
        *("num_preemptions", "kv_blocks_copied", "kv_blocks_shared", "iteration_tokens_total"),
        *("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "engine_restarts"),
        *("spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos"),
        *TIER_FAMILIES,
    )
)
"""Families, without prefix, whose values come from an engine: with several engines, there is a
sample for each, and their sum without the label `engine`."""
_MEAN = "kv_cache_usage_perc"
_DESCRIPTIONS = ("cache_config_info", "lora_requests_info")


class EngineSums(Collector):
    """Collects the families of `own`, those of ENGINE_FAMILIES from several engines: a sample of
    each, by the label `engine`, and their sum without it (their mean for a share)."""

    def __init__(self, own: Collector, engines: Mapping[str, Collector]) -> None:
        self._own = own
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """Yield the families for one page."""
        found: dict[str, list[tuple[str, Metric]]] = {}
        for engine, collector in self._engines.items():
            for family in collector.collect():
                found.setdefault(family.name, []).append((engine, family))
        for family in self._own.collect():
            short = family.name.partition(":")[2]
            parts = found.get(family.name, [])
            if short in ENGINE_FAMILIES:
                family.samples = [*_sums(parts, mean=short == _MEAN), *_labelled(parts)]
            elif short in _DESCRIPTIONS:
                family.samples = _labelled(parts)
            yield family


def _labelled(parts: list[tuple[str, Metric]]) -> list[PrometheusSample]:
    return [
        sample._replace(labels={**sample.labels, "engine": engine})
        for engine, family in parts
        for sample in family.samples
    ]


def _sums(parts: list[tuple[str, Metric]], *, mean: bool) -> list[PrometheusSample]:
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for _, family in parts:
        for sample in family.samples:
            if sample.name == f"{family.name}_created":
                continue
            labels = tuple(item for item in sample.labels.items() if item[0] != "engine")
            sums[sample.name, labels] = sums.get((sample.name, labels), 0.0) + sample.value
    count = len(parts) if mean else 1
    return [
        PrometheusSample(name, dict(labels), value / count)
        for (name, labels), value in sums.items()
    ]


class OneOfSeveral:
    """Observes one engine of several: `own` gets its numbers, and `shared` hears that it serves."""

    def __init__(self, shared: EngineObserver, own: EngineObserver) -> None:
        self._shared = shared
        self._own = own

    def engine_ready(self, info: EngineInfo) -> None:
        self._shared.engine_ready(info)
        self._own.engine_ready(info)

    def engine_restarted(self) -> None:
        self._own.engine_restarted()

    def observe_step(self, stats: EngineStats) -> None:
        self._own.observe_step(stats)
