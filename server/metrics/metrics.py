"""Prometheus metrics under vLLM's names, so that dashboards and autoscalers made for vLLM work.

Each process that serves HTTP has a private registry; `metrics_sum` adds up several. Label values
come only from the server (served names, route templates, error codes), never from a client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.registry import Collector

from ...engine.config import EngineInfo
from ...engine.outputs import EngineStats, FinishReason, Timings
from .families import Families, Prefix
from .histograms import (
    CHOICE_BUCKETS,
    HTTP_BUCKETS,
    ITERATION_BUCKETS,
    PREEMPTION_BUCKETS,
    REQUEST_LATENCY_BUCKETS,
    STEP_WAIT_BUCKETS,
    TOKEN_LATENCY_BUCKETS,
    TTFT_BUCKETS,
    RequestRecord,
    TokenHistogram,
    one_two_five,
)
from .metrics_sum import EngineSums, OneOfSeveral, Page, Sample, Totals, page_of, samples_of
from .tier_metrics import TierMetrics

WAITING_REASONS = ("capacity", "deferred")
"""Why a sequence waits, by vLLM's names. None is ever deferred here (held back although there is
room)."""
_PROBES = frozenset(
    {"/metrics", "/health", "/ready", "/live", "/ping", "/load", "/version", "/server_info"}
)
"""Paths whose requests vLLM does not count."""
HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Methods that are a label value; any other counts as OTHER."""

_STEP_COUNTERS = {
    "prefix_queries": ("prefix_cache_queries", "Prompt tokens looked up in the prefix index."),
    "prefix_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix index."),
    "preemptions": ("num_preemptions", "Sequences preempted because blocks ran out."),
    "blocks_copied": ("kv_blocks_copied", "Blocks copied on write or for a partial match."),
    "blocks_shared": ("kv_blocks_shared", "Blocks shared instead of computed."),
    "num_drafts": ("spec_decode_num_drafts", "Drafts that were verified."),
    "draft_tokens": ("spec_decode_num_draft_tokens", "Tokens of drafts."),
    "accepted_tokens": ("spec_decode_num_accepted_tokens", "Tokens of drafts that were right."),
}
"""Fields of EngineStats that count since the engine's start → name and help of their counter."""
_TOKEN_COUNTS = {
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Output tokens of a request.",
    "request_max_num_generation_tokens": "Output tokens of a request's longest choice.",
    "request_params_max_tokens": "max_tokens of a request.",
}
"""Histograms of tokens, whose buckets depend on the model's context: name → help."""


class Metrics:
    """The metrics of one process, as `/metrics` shows them.

    `model_name` is the first served name. The methods are called on the event loop. `engine` is the
    label of the engine that is observed; None is for several, each of which `observer_of` observes.
    """

    _tiers: TierMetrics | None = None

    def __init__(
        self,
        model_name: str,
        prefix: Prefix = "quire",
        engine: str | None = "0",
    ) -> None:
        labels = {"model_name": model_name} | ({} if engine is None else {"engine": engine})
        self._families = families = Families(prefix, labels)
        self.counter_by = families.counter_by
        """Registers a counter with more labels; see `Families`."""
        self._engines: dict[str, Collector] = {}
        """What is observed of each of several engines."""
        self._last_stats: EngineStats | None = None

        self._running = families.gauge("num_requests_running", "Sequences in the running batch.")
        self._waiting = families.gauge("num_requests_waiting", "Sequences waiting for a step.")
        by_reason = families.gauge_by(
            "num_requests_waiting_by_reason", "Sequences waiting for a step, by reason.", "reason"
        )
        self._waiting_for = {reason: by_reason(reason) for reason in WAITING_REASONS}
        self._ready = families.gauge("engine_ready", "1 while the engine serves, 0 otherwise.")
        self._kv_usage = families.gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self._step_counters = {
            field: families.counter(*name_help) for field, name_help in _STEP_COUNTERS.items()
        }
        self._accepted = families.counter_by(
            "spec_decode_num_accepted_tokens_per_pos",
            "Tokens of drafts that were right, by their place in the draft.",
            "position",
        )
        self._accepted(0)
        self._iteration = families.histogram(
            "iteration_tokens_total", "Tokens computed by a step.", ITERATION_BUCKETS
        )
        self._restarts = families.counter("engine_restarts", "Times the engine was restarted.")
        self._worker_restarts = families.counter(
            "http_worker_restarts", "Times an HTTP worker was restarted."
        )

        self._requests()
        self._latencies()
        self._token_counts: tuple[Histogram, ...] | None = None
        self._adapters: Gauge | None = None
        self._max_lora = 0
        self._http()

    def _requests(self) -> None:
        counter = self._families.counter
        self._prompt = counter("prompt_tokens", "Prompt tokens of started requests.")
        self._cached = counter("prompt_tokens_cached", "Prompt tokens found in the cache.")
        self._generated = counter("generation_tokens", "Generated tokens.")
        self._new_tokens = 0
        self._success = self.counter_by(
            "request_success", "Finished choices by reason.", "finished_reason"
        )
        for reason in get_args(FinishReason):
            self._success(reason)
        self._rejections = self.counter_by(
            "admission_rejections", "Requests refused on arrival, by error code.", "reason"
        )

    def _latencies(self) -> None:
        histogram = self._families.histogram
        self._ttft = histogram(
            "time_to_first_token_seconds", "Time from arrival to first token.", TTFT_BUCKETS
        )
        self._itl = TokenHistogram(
            f"{self._families.prefix}:inter_token_latency_seconds",
            "Time between consecutive tokens.",
            self._families.labels,
            TOKEN_LATENCY_BUCKETS,
        )
        self._families.registry.register(self._itl)
        self._tpot = histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token after the first, per request.",
            TOKEN_LATENCY_BUCKETS,
        )
        spans = {
            "e2e_request_latency_seconds": "Time from arrival to end.",
            "request_queue_time_seconds": "Time from arrival to first step.",
            "request_inference_time_seconds": "Time from first step to end.",
            "request_prefill_time_seconds": "Time from first step to first token.",
            "request_decode_time_seconds": "Time from first token to end.",
        }
        short = ("request_queue_time_seconds", "request_prefill_time_seconds")
        self._spans = {
            name: histogram(
                name, help, STEP_WAIT_BUCKETS if name in short else REQUEST_LATENCY_BUCKETS
            )
            for name, help in spans.items()
        }
        self._preemptions = histogram(
            "request_num_preemptions", "Preemptions of a request.", PREEMPTION_BUCKETS
        )
        self._n = histogram("request_params_n", "Choices of a request.", CHOICE_BUCKETS)

    def _http(self) -> None:
        self._http_requests = Counter(
            "http_requests",
            "HTTP requests by route, method and status.",
            ["handler", "method", "status"],
            registry=self._families.registry,
        )
        self._http_duration = Histogram(
            "http_request_duration_seconds",
            "Time until the whole answer was sent.",
            ["handler", "method"],
            buckets=HTTP_BUCKETS,
            registry=self._families.registry,
        )

    def engine_ready(self, info: EngineInfo) -> None:
        """Register the metrics that depend on the engine's sizes, at the first call only."""
        if self._token_counts is not None:
            return
        families, buckets = self._families, tuple(one_two_five(info.max_model_len))
        self._token_counts = tuple(
            families.histogram(name, help, buckets) for name, help in _TOKEN_COUNTS.items()
        )
        values = {
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_blocks),
            "cache_dtype": info.kv_cache_dtype or info.dtype,
        }
        shape = families.gauge_by("cache_config_info", "Shape of the KV cache; always 1.", *values)
        shape(*values.values()).set(1)
        if info.keeps_evicted:
            self._tiers = TierMetrics(families)
        if info.max_loras:
            self._adapters = Gauge(
                f"{families.prefix}:lora_requests_info",
                "LoRA adapters of running and waiting requests; the value is the time of the "
                "last change.",
                ["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
                registry=families.registry,
            )
            self._max_lora = info.max_loras

    def engine_health(self, ready: bool) -> None:
        """Show whether the engine serves. It is called before each page."""
        self._ready.set(ready)

    def engine_restarted(self) -> None:
        """Count a restart of the engine, whose own counters begin at zero again."""
        self._restarts.inc()
        self._last_stats = None
        self._running.set(0)
        self._set_waiting(0)
        self._kv_usage.set(0)

    def http_worker_restarted(self) -> None:
        """Count a restart of an HTTP worker."""
        self._worker_restarts.inc()

    def observe_step(self, stats: EngineStats) -> None:
        """Record the engine's snapshot after a step."""
        last = self._last_stats
        if last is not None and stats.step < last.step:
            last = None
        for field, counter in self._step_counters.items():
            counter.inc(getattr(stats, field) - (getattr(last, field) if last else 0))
        self._observe_drafts(stats.accepted_per_position, last)
        self._running.set(stats.num_running)
        self._set_waiting(stats.num_waiting)
        self._kv_usage.set(stats.kv_usage)
        if last is None or stats.step > last.step:
            self._iteration.observe(stats.step_tokens)
        if self._adapters is not None:
            self._observe_adapters(self._adapters, stats, last)
        if self._tiers is not None:
            self._tiers.observe(stats.tiers, last.tiers if last is not None else ())
        self._last_stats = stats

    def _observe_drafts(self, accepted: Sequence[int], last: EngineStats | None) -> None:
        before = last.accepted_per_position if last is not None else ()
        if accepted == before:
            return
        for position, count in enumerate(accepted):
            old = before[position] if before else 0
            if count > old:
                self._accepted(position).inc(count - old)

    def _set_waiting(self, count: int) -> None:
        self._waiting.set(count)
        self._waiting_for["capacity"].set(count)

    def _observe_adapters(self, gauge: Gauge, stats: EngineStats, last: EngineStats | None) -> None:
        """Show the adapters of this step in the labels of the only series of its metric."""
        names = stats.running_adapters, stats.waiting_adapters
        if last is None or names != (last.running_adapters, last.waiting_adapters):
            gauge.clear()
            running, waiting = (",".join(each) for each in names)
            gauge.labels(str(self._max_lora), running, waiting).set_to_current_time()

    def request_rejected(self, reason: str) -> None:
        """Count a refused request; `reason` is the `code` of an error in engine/errors.py."""
        self._rejections(reason).inc()

    def prompt_read(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Count a prompt, once: at the first output, or at the end if there was none."""
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)

    def tokens_generated(self, count: int) -> None:
        """Count output tokens. It is called for every output, so `render` updates the counter."""
        self._new_tokens += count

    def first_token(self, seconds: float, exemplar: dict[str, str] | None = None) -> None:
        """Record the time from a request's arrival to its first token."""
        self._ttft.observe(seconds, exemplar)

    def inter_token(self, seconds: float) -> None:
        """Record the time between two tokens of a choice."""
        self._itl.observe(seconds)

    def request_finished(self, record: RequestRecord) -> None:
        """Count a request that has ended, for any reason. Its tokens have already been counted."""
        generated = sum(record.generation_tokens)
        for reason in record.finish_reasons:
            self._success(reason).inc()
        longest = max(record.generation_tokens, default=0)
        self._n.observe(len(record.finish_reasons))
        self._preemptions.observe(record.preemptions)
        if self._token_counts is not None:
            counts = (record.prompt_tokens, generated, longest, record.max_tokens)
            for histogram, value in zip(self._token_counts, counts, strict=True):
                histogram.observe(value)
        if record.timings is not None:
            self._observe_timings(record.timings, longest, record.exemplar)

    def _observe_timings(
        self, timings: Timings, longest: int, exemplar: dict[str, str] | None
    ) -> None:
        """Record the latencies of a request whose longest choice has `longest` tokens."""
        spans = self._spans
        scheduled, first_token, finished, _ = timings
        spans["e2e_request_latency_seconds"].observe(finished, exemplar)
        if scheduled is None:
            return
        spans["request_queue_time_seconds"].observe(scheduled, exemplar)
        spans["request_inference_time_seconds"].observe(finished - scheduled)
        if first_token is None:
            return
        spans["request_prefill_time_seconds"].observe(first_token - scheduled)
        spans["request_decode_time_seconds"].observe(finished - first_token)
        if longest > 1:
            self._tpot.observe((finished - first_token) / (longest - 1))

    def http_request(self, handler: str | None, method: str, status: int, seconds: float) -> None:
        """Count an HTTP request. `handler` is the route's template, or None without a route.

        With vLLM's prefix, requests are counted as vLLM counts them, so that its panels and alerts
        find them: statuses are grouped (5xx), and probes are left out.
        """
        grouped = self._families.prefix == "vllm"
        if grouped and handler in _PROBES:
            return
        handler = handler or ("none" if grouped else "unmatched")
        label = f"{status // 100}xx" if grouped else str(status)
        method = method if method in HTTP_METHODS else "OTHER"
        self._http_requests.labels(handler=handler, method=method, status=label).inc()
        self._http_duration.labels(handler=handler, method=method).observe(seconds)

    def samples(self) -> list[Sample]:
        """Return the counts of this process, for the page of another one."""
        self._count_new_tokens()
        return samples_of(self._families.registry.collect())

    def render(self, others: Totals | None = None, *, openmetrics: bool = False) -> Page:
        """Return the page with the counts of `others` added. See `page_of`."""
        self._count_new_tokens()
        own: Collector = self._families.registry
        if self._engines:
            own = EngineSums(own, self._engines)
        return page_of(own, others or {}, openmetrics=openmetrics)

    def observer_of(self, engine: str) -> OneOfSeveral:
        """Return the observer of one of several engines."""
        families = self._families
        own = Metrics(families.labels["model_name"], families.prefix, engine)
        self._engines[engine] = own._families.registry
        return OneOfSeveral(self, own)

    def _count_new_tokens(self) -> None:
        self._generated.inc(self._new_tokens)
        self._new_tokens = 0
