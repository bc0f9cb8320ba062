"""The spans of a request.

    chat quire-demo          from the request's arrival to the end of its answer
    ├── queue                from arrival to the first step
    ├── prefill              from the first step to the first token
    └── decode               from the first token to the last

A request for several prompts has the three children once for each prompt. The times of the children
are the engine's own (`engine.outputs.Timings`), so they are written when the generation has ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping

import structlog
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ...engine.outputs import Timings
from . import attributes
from .current import EndedGeneration

log = structlog.get_logger(__name__)

CLOSE_SECONDS = 3.0
"""How long the last spans may take to be exported when the server stops."""
MAX_PROMPTS = 16
"""Prompts of a request whose phases and finish reasons are told; a rerank has hundreds."""
_CALLERS_HEADERS = ("traceparent", "tracestate")


class Tracer:
    """Begins the traces of requests, and hands their spans to `processor`.

    `model` is the name that answers carry. The environment's OTEL_SERVICE_NAME,
    OTEL_RESOURCE_ATTRIBUTES and OTEL_TRACES_SAMPLER apply; the service is named quire by default.
    """

    def __init__(self, model: str, version: str, processor: SpanProcessor) -> None:
        self._model = model
        resource = Resource.create({SERVICE_VERSION: version})
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "quire"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("quire", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, operation: str, method: str, headers: Mapping[str, str]) -> SpanOfRequest:
        """Begin the trace of a request: within that of its caller if it has sent a valid
        `traceparent`, and otherwise a new one."""
        sent = {name: headers[name] for name in _CALLERS_HEADERS if name in headers}
        span = self._tracer.start_span(
            operation,
            context=self._propagator.extract(sent, Context()),
            kind=SpanKind.SERVER,
            attributes={
                attributes.OPERATION: operation,
                attributes.PROVIDER: attributes.PROVIDER_NAME,
                attributes.HTTP_METHOD: method,
            },
        )
        return SpanOfRequest(self, span, operation, self._model)

    def write_phases(self, parent: Span, arrival: float, timings: Timings) -> None:
        """Write the queue, prefill and decode of one prompt, as far as it got. `arrival` is by
        `time.monotonic`."""
        context = set_span_in_context(parent, Context())
        # Spans have wall-clock times.
        arrived = time.time_ns() - time.monotonic_ns() + round(arrival * 1e9)
        for name, begin, end in _phases(timings):
            span = self._tracer.start_span(name, context, start_time=arrived + round(begin * 1e9))
            span.end(arrived + round(end * 1e9))

    def close(self) -> None:
        """Export what has ended and stop. The exporter has CLOSE_SECONDS for it, since a collector
        that is away must not hold up the end of the server."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            log.warning("traces_lost", seconds=CLOSE_SECONDS)


def _phases(timings: Timings) -> Iterable[tuple[str, float, float]]:
    """Yield the name, begin and end of each phase, in seconds since the request's arrival."""
    finished = timings.finished
    scheduled = finished if timings.scheduled is None else timings.scheduled
    first_token = finished if timings.first_token is None else timings.first_token
    yield "queue", 0.0, scheduled
    if timings.scheduled is not None:
        yield "prefill", scheduled, first_token
    if timings.first_token is not None:
        yield "decode", first_token, finished


class SpanOfRequest:
    """The RequestTrace of one HTTP request. See `RequestTrace` for when it ends."""

    def __init__(self, tracer: Tracer, span: Span, operation: str, model: str) -> None:
        self._tracer = tracer
        self._span = span
        self._operation = operation
        self._model = model
        self._open = 1  # the HTTP answer
        self._error: str | None = None
        self._failed = False

    @property
    def trace_id(self) -> str | None:
        context = self._span.get_span_context()
        return format_trace_id(context.trace_id) if context.trace_flags.sampled else None

    def generation_began(self) -> None:
        self._open += 1

    def generation_ended(self, ended: EndedGeneration) -> None:
        self._error = self._error or ended.error
        self._failed = self._failed or ended.error is not None
        if self._span.is_recording():
            values = attributes.of_generation(self._model, ended)
            shown = list(zip(ended.requests, ended.records, strict=True))[:MAX_PROMPTS]
            values[attributes.FINISH_REASONS] = [
                reason for _, record in shown for reason in record.finish_reasons
            ]
            self._span.set_attributes(values)
            self._span.update_name(f"{self._operation} {values[attributes.REQUEST_MODEL]}")
            for request, record in shown:
                if record.timings is not None:
                    self._tracer.write_phases(self._span, request.arrival_time, record.timings)
        self._end_part()

    @property
    def traceparent(self) -> str:
        """The header by which another process continues this trace."""
        context = self._span.get_span_context()
        return (
            f"00-{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}"
            f"-{context.trace_flags:02x}"
        )

    def answer_ended(
        self,
        request_id: str,
        route: str | None,
        status: int,
        error: str | None = None,
        *,
        was_cut: bool = False,
    ) -> None:
        """End the HTTP answer, whose x-request-id is `request_id`. `error` is the code of a refusal
        or failure. An answer that `was_cut` by its client or an exception ends the trace at once,
        since a generation that was not begun never ends."""
        self._error = self._error or error or (str(status) if status >= 500 else None)
        self._failed = self._failed or status >= 500
        if route is not None:
            self._span.set_attribute(attributes.HTTP_ROUTE, route)
        self._span.set_attribute(attributes.HTTP_STATUS, status)
        self._span.set_attribute(attributes.REQUEST_ID, request_id)
        if was_cut:
            self._open = 1
        self._end_part()

    def _end_part(self) -> None:
        self._open -= 1
        if self._open != 0:
            return
        if self._error is not None:
            self._span.set_attribute(attributes.ERROR_TYPE, self._error)
        if self._failed:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
