"""Test the traces of requests against the SDK's own exporter in memory, and once over OTLP."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes
from opentelemetry.trace import SpanKind, StatusCode
from structlog.testing import capture_logs

from quire.engine.embedding_spec import EmbeddingSpec
from quire.engine.errors import ConfigurationError
from quire.engine.outputs import RowError, Timings
from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams
from quire.server.metrics.histograms import RequestRecord
from quire.server.metrics.metrics import Metrics
from quire.server.serving.app import create_app
from quire.server.settings import Settings, load_settings
from quire.server.text.tokenizer import Tokenizer
from quire.server.tracing import attributes, spans, start
from quire.server.tracing.current import EndedGeneration, current
from quire.server.tracing.middleware import TracingMiddleware
from quire.server.tracing.spans import Tracer

from ..fakes import FakeEngineClient, Script, ids

MODEL = "tiny"
CALLER = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
SECRET_PROMPT, SECRET_KEY = "an unlikely prompt", "an-unlikely-key"
Ask = Callable[..., Any]


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def app(engine: FakeEngineClient, tokenizer: Tokenizer, exporter: InMemorySpanExporter) -> Any:
    settings = Settings(served_model_name=(MODEL,), generation_config="none", api_key=(SECRET_KEY,))
    tracer = Tracer(MODEL, "0", SimpleSpanProcessor(exporter))
    return create_app(settings, engine, tokenizer, Metrics(MODEL), tracer=tracer)


@pytest.fixture
def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),
        base_url="http://quire",
        headers={"authorization": f"Bearer {SECRET_KEY}"},
    )


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": SECRET_PROMPT}], "max_tokens": 50, **fields}


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def root(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = (one for one in exporter.get_finished_spans() if one.kind == SpanKind.SERVER)
    return span


# -- names -----------------------------------------------------------------------------------


def test_names_are_those_of_the_conventions() -> None:
    sources = (gen_ai_attributes, error_attributes, http_attributes)
    known = {value for source in sources for value in vars(source).values() if type(value) is str}
    ours = {
        value for name, value in vars(attributes).items() if name.isupper() and type(value) is str
    } - {attributes.PROVIDER_NAME}
    assert {name for name in ours if name not in known} == {
        attributes.REQUEST_ID,
        attributes.PREEMPTIONS,
    }
    operations = {each.value for each in gen_ai_attributes.GenAiOperationNameValues}
    assert set(attributes.OPERATIONS.values()) - operations == {"rerank", "score", "classify"}


def _routes(routes: Any) -> Iterator[Any]:
    for route in routes:
        if hasattr(route, "original_router"):
            yield from _routes(route.original_router.routes)
        else:
            yield route


def test_every_endpoint_that_generates_is_traced(app: Any) -> None:
    """Those that are left out generate nothing."""
    posts = {route.path for route in _routes(app.routes) if "POST" in getattr(route, "methods", ())}
    quiet = r"/ping|/tokenize|/detokenize|.*/(count|input)_tokens|.*/cancel|/v1/conversations.*"
    quiet += r"|/v1/(un)?load_lora_adapter|/v1/prefix_cache/reset"
    left = {path for path in posts if not re.fullmatch(quiet, path)}
    assert left == attributes.OPERATIONS.keys()


# -- spans -----------------------------------------------------------------------------------


async def test_a_chat_is_one_span_with_its_usage(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    answer = await client.post("/v1/chat/completions", json=chat(n=2, temperature=0.5, seed=1))
    usage = answer.json()["usage"]
    span = root(exporter)
    assert span.name == f"chat {MODEL}" and span.parent is None
    assert span.status.status_code == StatusCode.UNSET
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "quire",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "quire.request_id": answer.headers["x-request-id"],
        "quire.num_preemptions": 0,
    }
    assert span.resource.attributes["service.name"] == "quire"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat(stream=True)),
        ("/v1/completions", {"prompt": [SECRET_PROMPT, "b"], "max_tokens": 50, "stream": True}),
        ("/v1/responses", {"input": SECRET_PROMPT}),
        ("/v1/messages", chat()),
    ],
)
async def test_every_dialect_is_traced_without_content(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, path: str, body: dict[str, Any]
) -> None:
    await client.post(path, json=body)
    span = root(exporter)
    assert span.attributes is not None
    assert span.name == f"{attributes.OPERATIONS[path]} {MODEL}"
    prompts = len(body.get("prompt", [0]))
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",) * prompts
    told = "".join(one.to_json() for one in exporter.get_finished_spans())
    for secret in (SECRET_PROMPT, SECRET_KEY, "Hello, world"):
        assert secret not in told


async def test_embeddings_have_no_sampling_parameters(
    client: httpx.AsyncClient, engine: FakeEngineClient, exporter: InMemorySpanExporter
) -> None:
    engine.embedding = EmbeddingSpec(pooling="mean", normalize=False, size=4)
    answer = await client.post("/v1/embeddings", json={"input": "a text"})
    assert answer.status_code == 200, answer.text
    values = root(exporter).attributes or {}
    assert values["gen_ai.operation.name"] == "embeddings"
    assert "gen_ai.request.temperature" not in values


@pytest.mark.parametrize(
    ("path", "body", "key", "status", "code"),
    [
        ("/v1/chat/completions", {"messages": 1}, SECRET_KEY, 400, "invalid_value"),
        ("/v1/chat/completions", chat(), "wrong", 401, "invalid_api_key"),
        ("/v1/completions", {"prompt": "a", "model": "b"}, SECRET_KEY, 404, "model_not_found"),
    ],
)
async def test_a_refusal_is_traced_and_is_no_failure(
    client: httpx.AsyncClient,
    exporter: InMemorySpanExporter,
    path: str,
    body: dict[str, Any],
    key: str,
    status: int,
    code: str,
) -> None:
    await client.post(path, json=body, headers={"authorization": f"Bearer {key}"})
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None and span.name == attributes.OPERATIONS[path]
    assert span.attributes["http.response.status_code"] == status
    assert span.attributes["error.type"] == code
    assert span.status.status_code == StatusCode.UNSET


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_has_its_code(
    client: httpx.AsyncClient,
    engine: FakeEngineClient,
    exporter: InMemorySpanExporter,
    stream: bool,
) -> None:
    error = RowError("non_finite_logits", f"with {SECRET_PROMPT}")
    engine.scripts = lambda request, choice: Script(ids("ab"), "error", error)
    answer = await client.post("/v1/chat/completions", json=chat(stream=stream))
    span = root(exporter)
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == answer.status_code
    assert span.attributes["error.type"] == "non_finite_logits"
    assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert span.status.status_code == StatusCode.ERROR and not span.status.description
    assert not span.events  # an exception's text may hold what the client sent


async def test_an_engine_that_is_not_ready_is_a_failure(
    client: httpx.AsyncClient, engine: FakeEngineClient, exporter: InMemorySpanExporter
) -> None:
    engine.ready = False
    await client.post("/v1/completions", json={"prompt": "a"})
    span = root(exporter)
    assert span.attributes is not None and span.attributes["error.type"] == "engine_not_ready"
    assert span.status.status_code == StatusCode.ERROR


async def test_a_request_for_many_prompts_tells_of_the_first_ones(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    await client.post("/v1/completions", json={"prompt": ["a"] * 20, "max_tokens": 3})
    values = root(exporter).attributes or {}
    assert len(named(exporter, "queue")) == spans.MAX_PROMPTS == 16
    assert values["gen_ai.response.finish_reasons"] == ("length",) * 16
    assert values["gen_ai.usage.output_tokens"] == 60


async def test_a_background_response_ends_its_trace_later(
    client: httpx.AsyncClient, engine: FakeEngineClient, exporter: InMemorySpanExporter
) -> None:
    engine.hold = asyncio.Event()
    answer = await client.post("/v1/responses", json={"input": "a", "background": True})
    assert answer.json()["status"] == "queued" and not exporter.get_finished_spans()
    engine.hold.set()
    for _ in range(200):
        if exporter.get_finished_spans():
            break
        await asyncio.sleep(0.01)
    span = root(exporter)
    assert span.attributes is not None and span.attributes["gen_ai.usage.output_tokens"]


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/nowhere"])
async def test_other_requests_have_no_span(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, path: str
) -> None:
    await client.get(path)
    assert not exporter.get_finished_spans()


# -- context ---------------------------------------------------------------------------------


async def test_a_trace_continues_that_of_the_caller(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    for sent in (CALLER, "00-nonsense-01-01", CALLER.replace("-01", "-00")):
        await client.post("/v1/completions", json={"prompt": "a"}, headers={"traceparent": sent})
    ours, fresh = (
        span for span in exporter.get_finished_spans() if span.kind == SpanKind.SERVER
    )  # the third is not sampled, as its caller's is not
    assert ours.parent is not None and fresh.parent is None
    assert f"{ours.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{ours.parent.span_id:016x}" == CALLER.split("-")[2]


async def test_what_a_request_is_forwarded_with_continues_its_trace(
    exporter: InMemorySpanExporter,
) -> None:
    """Another HTTP worker, which gets the headers of the scope, makes a child of our span."""
    seen: list[tuple[bytes, bytes]] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    tracer = Tracer(MODEL, "0", SimpleSpanProcessor(exporter))
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/responses",
        "headers": [(b"traceparent", CALLER.encode()), (b"a", b"b")],
        "state": {"request_id": "id"},
    }
    await TracingMiddleware(inner, tracer)(scope, None, None)  # type: ignore[arg-type]
    own = root(exporter).context
    assert own.trace_id == int(CALLER.split("-")[1], 16)
    assert sorted(seen) == [
        (b"a", b"b"),
        (b"traceparent", f"00-{own.trace_id:032x}-{own.span_id:016x}-01".encode()),
    ]


async def test_a_client_that_leaves_ends_its_trace(exporter: InMemorySpanExporter) -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        current_trace = current.get()
        assert current_trace is not None
        current_trace.generation_began()  # and it is never run
        await receive()

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    path = {"type": "http", "method": "POST", "path": "/v1/completions"}
    scope = {**path, "headers": [], "state": {"request_id": "id"}}
    tracer = Tracer(MODEL, "0", SimpleSpanProcessor(exporter))
    await TracingMiddleware(inner, tracer)(scope, receive, None)  # type: ignore[arg-type]
    span = root(exporter)
    assert span.attributes is not None and span.attributes["http.response.status_code"] == 499
    assert span.status.status_code == StatusCode.UNSET and current.get() is None


async def test_exemplars_lead_from_a_bucket_to_the_trace(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    answer = await client.post(
        "/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "mine"}
    )
    accept = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
    page = (await client.get("/metrics", headers=accept)).text
    trace = f"{root(exporter).context.trace_id:032x}"
    found = re.findall(r"time_to_first_token_seconds_bucket\{[^}]*\} \S+ # (\{.*?\})", page)
    assert found == [f'{{request_id="mine",trace_id="{trace}"}}'], answer.text


# -- times -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timings", "phases"),
    [
        (Timings(0.5, 2, 5), {"queue": 0.5, "prefill": 1.5, "decode": 3}),
        (Timings(0.5, None, 1), {"queue": 0.5, "prefill": 0.5}),
        (Timings(None, None, 1), {"queue": 1}),
    ],
)
def test_children_have_the_times_of_the_engine(
    exporter: InMemorySpanExporter, timings: Timings, phases: dict[str, float]
) -> None:
    trace = Tracer(MODEL, "0", SimpleSpanProcessor(exporter)).begin("chat", "POST", {})
    request = Request(
        request_id="r",
        prompt_token_ids=(1,),
        sampling_params=SamplingParams(max_tokens=1),
        arrival_time=10,
    )
    record = RequestRecord(
        prompt_tokens=1,
        max_tokens=1,
        finish_reasons=("stop",),
        generation_tokens=(1,),
        timings=timings,
    )
    trace.generation_began()
    trace.answer_ended("id", "/", 200)
    assert not exporter.get_finished_spans()
    trace.generation_ended(EndedGeneration([request], [record], 0, None))
    *children, parent = exporter.get_finished_spans()
    lengths = {}
    for before, span in zip([None, *children], children, strict=False):
        assert span.parent == parent.context and span.start_time and span.end_time
        lengths[span.name] = round((span.end_time - span.start_time) / 1e9, 3)
        if before is not None:
            assert abs(span.start_time - (before.end_time or 0)) < 1e7
    assert lengths == phases


# -- OTLP ------------------------------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Yield the address of a collector, and what it receives."""
    received: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["content-length"])
            received.append((self.path, self.rfile.read(size)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


async def test_spans_reach_a_collector_when_the_server_stops(
    engine: FakeEngineClient,
    tokenizer: Tokenizer,
    collector: tuple[str, list[tuple[str, bytes]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, received = collector
    monkeypatch.setenv("OTEL_SERVICE_NAME", "kitchen")
    settings = load_settings(
        served_model_name=(MODEL,), generation_config="none", otlp_traces_endpoint=address
    )
    app = create_app(settings, engine, tokenizer, Metrics(MODEL))
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://quire") as client,
    ):
        await client.post("/v1/completions", json={"prompt": "a"})
    ((path, body),) = received
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert named["service.name"] == "kitchen"
    names = [span.name for span in resource.scope_spans[0].spans]
    assert names == ["queue", f"text_completion {MODEL}"]


def test_a_collector_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "CLOSE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        tracer = Tracer(MODEL, "0", BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=1)))
        tracer.begin("chat", "POST", {}).answer_ended("id", "/", 200)
        began = time.monotonic()
        with capture_logs() as log:
            tracer.close()
        assert time.monotonic() - began < 0.9
    assert [(entry["event"], entry["seconds"]) for entry in log] == [("traces_lost", 0.3)]


# -- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("https://collector/", "https://collector/v1/traces"),
        ("http://collector/otel/traces", "http://collector/otel/traces"),
    ],
)
def test_an_endpoint_without_a_path_gets_that_of_otlp(given: str, used: str) -> None:
    assert load_settings(otlp_traces_endpoint=given).otlp_traces_endpoint == used


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("grpc://collector:4317", "gRPC"),
        ("collector:4318", "is not a URL"),
        ("http://", "is not a URL"),
        ("http://me:pw@collector", "OTEL_EXPORTER_OTLP_HEADERS"),
    ],
)
def test_a_wrong_endpoint_is_refused(given: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=f"otlp_traces_endpoint: .*{reason}"):
        load_settings(otlp_traces_endpoint=given)


def test_without_the_extra_the_start_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "for name in ('opentelemetry', 'opentelemetry.sdk'): sys.modules[name] = None\n"
        "from quire.server.cli import main\n"
        "sys.argv = ['quire', 'serve', '--otlp-traces-endpoint', 'http://127.0.0.1:9']\n"
        "sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "pip install 'quire-server[otel]'" in line


def test_without_the_flag_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys, json\n"
        "import quire.server.serving.main, quire.server.serving.app\n"
        "print(json.dumps([n for n in sys.modules if n.startswith('opentelemetry.sdk')]))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout) == [], done.stderr


def test_no_tracer_is_made_without_an_endpoint() -> None:
    assert start.make_tracer(load_settings(), "0") is None
