"""The metrics page, parsed with prometheus_client's own parser."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from quire.engine.config import EngineInfo
from quire.engine.outputs import EngineStats, TierStats, Timings
from quire.server.metrics.histograms import RequestRecord, exemplar
from quire.server.metrics.metrics import Metrics

from .fakes import FakeEngineClient, Script, ids

INFO = EngineInfo(
    model="m",
    architecture="Fake",
    device="cpu",
    dtype="float32",
    num_parameters=1,
    vocab_size=10,
    max_model_len=4096,
    block_size=16,
    num_blocks=100,
    kv_bytes_per_token=1,
    max_num_batched_tokens=512,
    is_asynchronous=False,
    max_num_seqs=4,
    max_logprobs=20,
    eos_token_ids=(0,),
)
MODEL_LABELS = {"model_name": "m", "engine": "0"}
TINY = frozenset({"model_name": "tiny", "engine": "0"}.items())


def read(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    page, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    own = {} if name.startswith("http_") else MODEL_LABELS
    name = name if name.startswith("http_") else f"quire:{name}"
    return read(metrics)[name, frozenset({**own, **labels}.items())]


def stats(step: int, **fields: Any) -> EngineStats:
    zero: dict[str, Any] = dict.fromkeys(EngineStats._fields, 0) | {"accepted_per_position": ()}
    return EngineStats(
        **{**zero, "num_blocks": 100, "num_free_blocks": 100, "step": step, **fields}
    )


def record(**fields: object) -> RequestRecord:
    defaults: dict[str, object] = {
        "prompt_tokens": 10,
        "max_tokens": 30,
        "finish_reasons": ("stop", "length"),
        "generation_tokens": (11, 21),
        "timings": Timings(1.0, 3.0, 13.0),
    }
    return RequestRecord(**{**defaults, **fields})  # type: ignore[arg-type]


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("m")
    metrics.engine_ready(INFO)
    return metrics


VLLM_NAMES = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "num_requests_waiting_by_reason": "gauge",
    "kv_cache_usage_perc": "gauge",
    "engine_ready": "gauge",
    "cache_config_info": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "spec_decode_num_drafts": "counter",
    "spec_decode_num_draft_tokens": "counter",
    "spec_decode_num_accepted_tokens": "counter",
    "spec_decode_num_accepted_tokens_per_pos": "counter",
    "prompt_tokens": "counter",
    "prompt_tokens_cached": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "admission_rejections": "counter",
    "kv_blocks_copied": "counter",
    "kv_blocks_shared": "counter",
    "engine_restarts": "counter",
    "http_worker_restarts": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "request_params_max_tokens": "histogram",
    "request_max_num_generation_tokens": "histogram",
    "request_num_preemptions": "histogram",
    "request_params_n": "histogram",
    "iteration_tokens_total": "histogram",
}


@pytest.mark.parametrize("prefix", ["quire", "vllm"])
def test_names_and_types(prefix: str) -> None:
    metrics = Metrics("m", prefix)  # type: ignore[arg-type]
    metrics.engine_ready(INFO)
    families = {
        family.name: family.type
        for family in text_string_to_metric_families(metrics.render()[0].decode())
    }
    expected = {f"{prefix}:{name}": kind for name, kind in VLLM_NAMES.items()}
    expected |= {"http_requests": "counter", "http_request_duration_seconds": "histogram"}
    assert families == expected


VLLM_DASHBOARD = {
    "e2e_request_latency_seconds": ("_bucket", "_sum", "_count"),
    "time_to_first_token_seconds": ("_bucket", "_sum", "_count"),
    "inter_token_latency_seconds": ("_bucket", "_sum", "_count"),
    "request_prompt_tokens": ("_bucket",),
    "request_generation_tokens": ("_bucket",),
    "request_max_num_generation_tokens": ("_sum",),
    "request_queue_time_seconds": ("_sum",),
    "request_prefill_time_seconds": ("_sum",),
    "request_decode_time_seconds": ("_sum",),
    "prompt_tokens": ("_total",),
    "generation_tokens": ("_total",),
    "request_success": ("_total",),
    "num_requests_running": ("",),
    "num_requests_waiting": ("",),
    "kv_cache_usage_perc": ("",),
}
"""What the queries of vLLM's own dashboard (examples/observability/prometheus_grafana) read. All
select by model_name; buckets are summed by le, and request_success by finished_reason."""


@pytest.mark.parametrize("name", VLLM_DASHBOARD)
def test_the_dashboard_of_vllm_finds_what_it_reads(name: str) -> None:
    metrics = Metrics("m", "vllm")
    metrics.engine_ready(INFO)
    labels: dict[str, set[str]] = {}
    for sample, pairs in read(metrics):
        labels.setdefault(sample, set()).update(dict(pairs))
    for end in VLLM_DASHBOARD[name]:
        wanted = {"model_name"} | ({"le"} if end == "_bucket" else set())
        wanted |= {"finished_reason"} if name == "request_success" else set()
        assert wanted <= labels[f"vllm:{name}{end}"]


# -- OpenMetrics -----------------------------------------------------------------------------


def openmetrics(metrics: Metrics) -> dict[str, list[Any]]:
    page, content_type = metrics.render(openmetrics=True)
    assert content_type.startswith("application/openmetrics-text")
    families = parse_openmetrics(page.decode())  # type: ignore[no-untyped-call]
    return {family.name: family.samples for family in families}


def test_the_page_of_openmetrics_has_the_same_series() -> None:
    metrics = Metrics("m")
    metrics.engine_ready(replace(INFO, max_loras=2))
    metrics.observe_step(stats(1, running_adapters=["a"], waiting_adapters=[]))
    metrics.request_rejected("queue_full")
    metrics.http_request("/health", "GET", 200, 0.1)
    metrics.inter_token(0.1)
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for samples in openmetrics(metrics).values()
        for sample in samples
    }
    assert found == read(metrics)


@pytest.mark.parametrize(
    ("request_id", "trace_id", "labels"),
    [
        ("r" * 32, None, {"request_id": "r" * 32}),
        ("r" * 32, "f" * 32, {"request_id": "r" * 32, "trace_id": "f" * 32}),
        ("r" * 128, "f" * 32, {"trace_id": "f" * 32}),
        ("r" * 128, None, None),
    ],
)
def test_a_slow_bucket_leads_to_its_request(
    request_id: str, trace_id: str | None, labels: dict[str, str] | None
) -> None:
    metrics = Metrics("m")
    assert exemplar(request_id, trace_id) == labels
    metrics.first_token(6.0, labels)
    metrics.request_finished(
        RequestRecord(
            prompt_tokens=1, max_tokens=1, finish_reasons=("stop",), generation_tokens=(1,),
            timings=Timings(6, 7, 100), exemplar=labels,
        )
    )  # fmt: skip
    pages = openmetrics(metrics)
    for name, bucket in (
        ("time_to_first_token_seconds", "7.5"),
        ("e2e_request_latency_seconds", "120.0"),
        ("request_queue_time_seconds", "10.0"),
    ):
        marked = [
            (sample.labels["le"], sample.exemplar.labels)
            for sample in pages[f"quire:{name}"]
            if sample.exemplar
        ]
        assert marked == ([] if labels is None else [(bucket, labels)])


async def test_metrics_show_whether_the_engine_serves(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    for ready in (True, False):
        engine.ready = ready
        page = (await client.get("/metrics")).text
        assert re.findall(r"^quire:engine_ready\{.*\} (.*)$", page, re.M) == [f"{ready:d}.0"]


def buckets(metrics: Metrics, name: str) -> list[float]:
    return [
        float(dict(labels)["le"])
        for sample, labels in read(metrics)
        if sample == f"quire:{name}_bucket"
    ]


def test_buckets(metrics: Metrics) -> None:
    inf = float("inf")
    assert buckets(metrics, "request_params_n") == [1, 2, 5, 10, 20, inf]
    assert buckets(metrics, "request_prompt_tokens")[-4:] == [500, 1000, 2000, inf]
    assert buckets(metrics, "iteration_tokens_total")[:4] == [1, 8, 16, 32]
    assert buckets(metrics, "iteration_tokens_total")[-2:] == [16384, inf]
    assert len(buckets(metrics, "time_to_first_token_seconds")) == 23
    assert len(buckets(metrics, "inter_token_latency_seconds")) == 20
    assert len(buckets(metrics, "e2e_request_latency_seconds")) == 25
    # A wait of one step and a wait of a quarter of a second fall into different buckets, and vLLM's
    # buckets are all there.
    vllm = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60]
    vllm += [120, 240, 480, 960, 1920, 7680, inf]
    for name in ("request_queue_time_seconds", "request_prefill_time_seconds"):
        assert buckets(metrics, name) == [0.001, 0.003, 0.01, 0.03, 0.1, *vllm]
    assert buckets(metrics, "request_decode_time_seconds") == [0.01, 0.03, 0.1, *vllm]
    assert buckets(metrics, "request_num_preemptions") == [0, 1, 2, 3, 4, 5, 10, 20, inf]


def test_counters_keep_counting_across_engine_restarts(metrics: Metrics) -> None:
    metrics.observe_step(stats(1, preemptions=5, prefix_hits=100))
    metrics.observe_step(stats(2, preemptions=7, prefix_hits=100))
    metrics.observe_step(stats(2, preemptions=7, prefix_hits=100))
    assert value(metrics, "num_preemptions_total") == 7
    metrics.engine_restarted()
    metrics.observe_step(stats(9, preemptions=9, prefix_hits=1))
    assert value(metrics, "num_preemptions_total") == 16
    assert value(metrics, "prefix_cache_hits_total") == 101
    # Without an announcement, a lower step number reveals the restart.
    metrics.observe_step(stats(1, preemptions=10))
    assert value(metrics, "num_preemptions_total") == 26
    assert value(metrics, "engine_restarts_total") == 1


def test_drafts_are_counted_by_position(metrics: Metrics) -> None:
    def accepted(position: int) -> float:
        name = "spec_decode_num_accepted_tokens_per_pos_total"
        return value(metrics, name, position=str(position))

    metrics.observe_step(
        stats(1, num_drafts=2, draft_tokens=6, accepted_tokens=3, accepted_per_position=(2, 1, 0))
    )
    metrics.observe_step(
        stats(2, num_drafts=3, draft_tokens=9, accepted_tokens=5, accepted_per_position=(3, 2, 0))
    )
    assert value(metrics, "spec_decode_num_drafts_total") == 3
    assert value(metrics, "spec_decode_num_draft_tokens_total") == 9
    assert value(metrics, "spec_decode_num_accepted_tokens_total") == 5
    assert (accepted(0), accepted(1)) == (3, 2)
    metrics.engine_restarted()
    metrics.observe_step(stats(1, accepted_per_position=(1, 0, 0)))
    assert (accepted(0), accepted(1)) == (4, 2)


@pytest.mark.parametrize("several", [False, True])
def test_evicted_blocks_are_counted_by_tier(several: bool) -> None:
    shared = Metrics("m", engine=None if several else "0")
    observer = shared.observer_of("0") if several else shared
    observer.engine_ready(replace(INFO, keeps_evicted=True))
    host, disk = (
        TierStats("host", 5, 9, 100, 7, 2, 1, 0),
        TierStats("disk", 3, None, 100, 4, 1, 0, 6),
    )
    observer.observe_step(stats(1, tiers=[host, disk]))
    observer.observe_step(stats(2, tiers=[host._replace(stored=8, num_blocks=6), disk]))

    def of(name: str, tier: str) -> float:
        return value(shared, f"kv_tier_{name}", tier=tier)

    assert (of("blocks", "host"), of("blocks", "disk")) == (6, 3)
    assert (of("stored_blocks_total", "host"), of("stored_bytes_total", "host")) == (8, 800)
    assert (of("loaded_blocks_total", "disk"), of("loaded_bytes_total", "disk")) == (1, 100)
    assert (of("dropped_blocks_total", "host"), of("failed_blocks_total", "disk")) == (1, 6)
    observer.engine_restarted()
    observer.observe_step(stats(1, tiers=[host]))
    assert of("stored_blocks_total", "host") == 15


def test_gauges_and_step_sizes(metrics: Metrics) -> None:
    busy = stats(1, num_running=3, num_waiting=2, num_free_blocks=25, step_tokens=40)
    metrics.observe_step(busy)
    metrics.observe_step(busy)  # the same step again, as in a heartbeat
    assert value(metrics, "num_requests_running") == 3
    assert value(metrics, "num_requests_waiting") == 2
    assert value(metrics, "num_requests_waiting_by_reason", reason="capacity") == 2
    assert value(metrics, "num_requests_waiting_by_reason", reason="deferred") == 0
    assert value(metrics, "kv_cache_usage_perc") == 0.75
    assert value(metrics, "iteration_tokens_total_count") == 1
    assert value(metrics, "iteration_tokens_total_sum") == 40
    metrics.engine_restarted()
    assert value(metrics, "num_requests_running") == value(metrics, "kv_cache_usage_perc") == 0
    assert value(metrics, "num_requests_waiting_by_reason", reason="capacity") == 0


def test_finished_request(metrics: Metrics) -> None:
    metrics.request_finished(record(preemptions=3))
    for reason in ("stop", "length"):
        assert value(metrics, "request_success_total", finished_reason=reason) == 1
    for reason in ("abort", "error"):
        assert value(metrics, "request_success_total", finished_reason=reason) == 0
    sums = {
        "e2e_request_latency_seconds": 13,
        "request_queue_time_seconds": 1,
        "request_inference_time_seconds": 12,
        "request_prefill_time_seconds": 2,
        "request_decode_time_seconds": 10,
        "request_time_per_output_token_seconds": 0.5,
        "request_params_n": 2,
        "request_params_max_tokens": 30,
        "request_generation_tokens": 32,
        "request_max_num_generation_tokens": 21,
        "request_num_preemptions": 3,
        "request_prompt_tokens": 10,
    }
    assert {name: value(metrics, f"{name}_sum") for name in sums} == sums


def test_tokens_are_counted_as_they_arrive(metrics: Metrics) -> None:
    metrics.prompt_read(10, 4)
    for count in (1, 0, 3):
        metrics.tokens_generated(count)
    for _ in range(2):  # rendering the page twice does not count tokens twice
        assert value(metrics, "prompt_tokens_total") == 10
        assert value(metrics, "prompt_tokens_cached_total") == 4
        assert value(metrics, "generation_tokens_total") == 4
    metrics.tokens_generated(5)
    metrics.request_finished(record())
    assert value(metrics, "generation_tokens_total") == 9


async def test_a_request_counts_its_tokens_before_it_ends(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    metrics = client.app.state.quire.metrics  # type: ignore[attr-defined]

    def totals() -> list[float]:
        names = ("prompt_tokens", "prompt_tokens_cached", "generation_tokens")
        return [read(metrics)[f"quire:{name}_total", TINY] for name in names]

    engine.scripts = lambda request, choice: Script(ids("abcd"), delay=0.02)
    fields = {"model": "tiny", "prompt": ["ab", "abc"], "n": 2, "max_tokens": 50}
    answering = asyncio.create_task(client.post("/v1/completions", json=fields))
    assert totals() == [0, 0, 0]
    seen = set()
    while not answering.done():
        await asyncio.sleep(0.005)
        seen.add(totals()[2])
    assert len(seen) > 3, seen
    usage = answering.result().json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert totals() == [usage["prompt_tokens"], cached, usage["completion_tokens"]] == [5, 6, 20]
    # A request that ends before its first output still counts its prompt.
    engine.ready = False
    assert (await client.post("/v1/completions", json=fields)).status_code == 503
    assert totals() == [5, 6, 20]  # a refused request adds no tokens
    engine.ready, engine.hold = True, asyncio.Event()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await client.post("/v1/completions", json=fields)
    assert totals() == [10, 6, 20]


async def test_preemptions_of_all_choices_are_added_up(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    metrics = client.app.state.quire.metrics  # type: ignore[attr-defined]
    engine.scripts = lambda request, choice: Script(ids("ab"), preemptions=2 * choice)
    await client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "n": 3})
    page = read(metrics)
    assert page["quire:request_num_preemptions_sum", TINY] == 6
    assert page["quire:request_num_preemptions_count", TINY] == 1


def test_request_that_never_ran(metrics: Metrics) -> None:
    metrics.request_finished(record(timings=Timings(None, None, 2.0)))
    metrics.request_finished(record(timings=Timings(1.0, None, 2.0)))
    metrics.request_finished(record(timings=None, finish_reasons=("error",)))
    assert value(metrics, "e2e_request_latency_seconds_count") == 2
    assert value(metrics, "request_queue_time_seconds_count") == 1
    assert value(metrics, "request_prefill_time_seconds_count") == 0


def test_requests_before_the_engine_is_ready() -> None:
    metrics = Metrics("m")
    metrics.request_finished(record())
    metrics.request_rejected("queue_full")
    assert value(metrics, "admission_rejections_total", reason="queue_full") == 1


def test_ready_again_after_a_restart_is_idempotent(metrics: Metrics) -> None:
    metrics.engine_ready(INFO)
    labels = {"block_size": "16", "num_gpu_blocks": "100", "cache_dtype": "float32"}
    assert value(metrics, "cache_config_info", **labels) == 1


def test_token_latencies(metrics: Metrics) -> None:
    metrics.first_token(0.3)
    metrics.inter_token(0.02)
    assert value(metrics, "time_to_first_token_seconds_sum") == 0.3
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.025") == 1


def test_http_labels_are_bounded(metrics: Metrics) -> None:
    for number in range(50):
        metrics.http_request("/v1/models", f"METHOD{number}", 405, 0.1)
    metrics.http_request("/v1/models", "GET", 200, 0.1)
    series = [labels for name, labels in read(metrics) if name == "http_requests_total"]
    assert len(series) == 2
    labels = {"handler": "/v1/models", "method": "OTHER", "status": "405"}
    assert value(metrics, "http_requests_total", **labels) == 50


def test_http_requests_with_the_prefix_vllm_are_counted_as_vllm_counts_them() -> None:
    metrics = Metrics("m", "vllm")
    for handler in ("/health", "/metrics", "/load", "/ping", "/version"):
        metrics.http_request(handler, "GET", 200, 0.1)
    for status in (200, 400, 404, 500, 503):
        metrics.http_request("/v1/completions", "POST", status, 0.1)
    metrics.http_request(None, "GET", 404, 0.1)
    assert {
        tuple(sorted(labels)): count
        for (name, labels), count in read(metrics).items()
        if name == "http_requests_total"
    } == {
        (("handler", handler), ("method", method), ("status", status)): count
        for handler, method, status, count in (
            ("/v1/completions", "POST", "2xx", 1),
            ("/v1/completions", "POST", "4xx", 2),
            ("/v1/completions", "POST", "5xx", 2),
            ("none", "GET", "4xx", 1),
        )
    }


def test_the_page_has_no_creation_times(metrics: Metrics) -> None:
    metrics.request_finished(record())
    page = metrics.render()[0].decode()
    assert "_created" not in page
    assert not any(sample.key.name.endswith("_created") for sample in metrics.samples())


def test_a_hostile_served_name_cannot_break_the_page() -> None:
    metrics = Metrics('m"} 1\nevil 2')
    names = {name for name, _ in read(metrics)}
    assert "evil" not in names


def test_two_registries_are_independent() -> None:
    first, second = Metrics("m"), Metrics("m")
    first.engine_restarted()
    assert value(second, "engine_restarts_total") == 0


def test_the_adapters_of_requests_are_labels_of_one_series() -> None:
    metrics = Metrics("m")
    metrics.engine_ready(replace(INFO, max_loras=2))

    def series() -> list[dict[str, str]]:
        return [
            dict(labels) for name, labels in read(metrics) if name == "quire:lora_requests_info"
        ]

    assert series() == []
    for step, running, waiting in ((1, ["a", "b"], ["c"]), (2, ["b"], []), (3, ["b"], [])):
        step_stats = stats(step)._replace(running_adapters=running, waiting_adapters=waiting)
        metrics.observe_step(step_stats)
        assert series() == [
            {
                "max_lora": "2",
                "running_lora_adapters": ",".join(running),
                "waiting_lora_adapters": ",".join(waiting),
            }
        ]
