"""The tracer that the settings ask for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ...engine.errors import ConfigurationError
from ..about import install_extra
from ..settings import Settings

if TYPE_CHECKING:
    from .spans import Tracer

_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def check_tracing(settings: Settings) -> None:
    """Raise ConfigurationError if traces are asked for and OpenTelemetry is not installed."""
    if settings.otlp_traces_endpoint is not None and not all(map(_is_installed, _NEEDED)):
        raise ConfigurationError(
            f"otlp_traces_endpoint: traces need OpenTelemetry: {install_extra('otel')}"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def make_tracer(settings: Settings, version: str) -> Tracer | None:
    """Return a tracer that exports by OTLP over HTTP, or None if no endpoint is set.

    Raises ConfigurationError if OpenTelemetry is not installed.
    """
    if settings.otlp_traces_endpoint is None:
        return None
    check_tracing(settings)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from .spans import Tracer

    exporter = OTLPSpanExporter(endpoint=settings.otlp_traces_endpoint)
    return Tracer(settings.served_names[0], version, BatchSpanProcessor(exporter))
