"""The buckets of the metrics' histograms, and a histogram that is cheap enough for every token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ...engine.outputs import FinishReason, Timings

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5),
    *(10, 20, 40, 80, 160, 640, 2560),
)
TOKEN_LATENCY_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5),
    *(10, 20, 40, 80),
)
REQUEST_LATENCY_BUCKETS = (
    *(0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
STEP_WAIT_BUCKETS = (0.001, 0.003, *REQUEST_LATENCY_BUCKETS)
HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
CHOICE_BUCKETS = (1, 2, 5, 10, 20)
PREEMPTION_BUCKETS = (0, 1, 2, 3, 4, 5, 10, 20)
ITERATION_BUCKETS = (1, *(2**exponent for exponent in range(3, 15)))
"""Buckets of the histograms: seconds, choices and preemptions per request, and tokens per step.

They are vLLM's and some below its first: a request waits for one step, a few milliseconds, unless
there is a queue, and a short answer takes less than 0.3 s. With vLLM's alone all of these would
look like 0.15 s.
"""


_MAX_EXEMPLAR = 128
"""Characters that the labels of an exemplar may have in all, by OpenMetrics."""


def exemplar(request_id: str, trace_id: str | None) -> dict[str, str] | None:
    """Return the labels of an exemplar, which leads from a bucket to the log's entries of a request
    and to its trace. An id that leaves no room is left out, since a client may choose a long one;
    None is returned if nothing is left."""
    labels = {} if trace_id is None else {"trace_id": trace_id}
    used = sum(len(name) + len(value) for name, value in labels.items())
    if used + len("request_id") + len(request_id) <= _MAX_EXEMPLAR:
        labels["request_id"] = request_id
    return labels or None


class TokenHistogram(Collector):
    """A histogram that is cheap enough to observe every token: a bisection and three additions.

    prometheus_client's own takes locks and walks its buckets, which costs more than formatting the
    token. This one needs no lock, because all calls, rendering included, come from the event loop.
    """

    def __init__(
        self, name: str, help: str, labels: dict[str, str], buckets: tuple[float, ...]
    ) -> None:
        self._name, self._help, self._labels, self._bounds = name, help, labels, buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._help, labels=list(self._labels))
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        cumulated = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric(list(self._labels.values()), cumulated, self._sum)
        yield family


def one_two_five(largest: int) -> Iterator[int]:
    """Yield 1, 2, 5, 10, 20, … up to `largest`."""
    decade = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * decade > largest:
                return
            yield mantissa * decade
        decade *= 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A request that was admitted and has ended; refused ones go to `Metrics.request_rejected`.

    `finish_reasons` and `generation_tokens` have one entry for each choice. `timings` is that of
    the choice that ended last, or None if the engine died.
    """

    prompt_tokens: int
    max_tokens: int
    finish_reasons: tuple[FinishReason, ...]
    generation_tokens: tuple[int, ...]
    timings: Timings | None
    preemptions: int = 0
    """Of all choices."""
    exemplar: dict[str, str] | None = None
    """What the latencies lead to; see `exemplar`."""
