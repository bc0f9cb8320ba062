"""The application and the HTTP server of one process: the only one, or one of several workers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from ...engine.checkpoints.gguf_tokenizer import tokenizer_folder
from ...engine.client import EngineClient
from ...engine.process.json_logs import take_over_libraries
from ..metrics.metrics import Metrics
from ..settings import Settings
from ..text.torch_free import import_transformers
from .system_limits import max_connections

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..http.siblings import Siblings

KEEP_ALIVE_SECONDS = 75
"""Seconds that an idle connection stays open: longer than at the usual load balancers, which must
be the ones that close it."""
LAST_ANSWERS_SECONDS = 5
"""Seconds after the drain in which unfinished requests may still send their error event."""


def build_app(
    settings: Settings,
    engine: EngineClient,
    metrics: Metrics,
    siblings: Siblings | None = None,
) -> FastAPI:
    """Load the tokenizer and build the application around it. Raises StartupError."""
    trust_remote_code = settings.engine_config().trust_remote_code
    if not trust_remote_code:  # the code of the model's own tokenizer may use torch
        import_transformers()
    from ..text.tokenizer import Tokenizer
    from .app import create_app

    take_over_libraries()
    tokenizer = Tokenizer.load(
        tokenizer_folder(settings.model_path, settings.engine_config().gguf_file),
        trust_remote_code=trust_remote_code,
        chat_template=settings.chat_template,
    )
    return create_app(settings, engine, tokenizer, metrics, siblings)


def uvicorn_server(settings: Settings, app: FastAPI) -> uvicorn.Server:
    """Return an HTTP server for the application, with limits of our own on headers and on the
    number of connections."""
    from ..http.http_protocol import MAX_HEADER_BYTES, HeaderCountMiddleware
    from .connections import BoundedProtocol, Connections, ProbesOnlyMiddleware

    class Protocol(BoundedProtocol):
        write_seconds = settings.stream_stall_timeout
        all_open = Connections(max_connections())

    config = uvicorn.Config(
        HeaderCountMiddleware(ProbesOnlyMiddleware(app, settings.root_path.rstrip("/"))),
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which neither drain nor exit with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_metrics(settings: Settings) -> Metrics:
    """Return the metrics of a server with these settings."""
    engine = "0" if settings.data_parallel_size == 1 else None
    return Metrics(settings.served_names[0], settings.metrics_prefix, engine)


def routing_counter(metrics: Metrics) -> Callable[[int, int], None]:
    """Register the counts of how well requests are routed; return the function that counts one by
    the cached tokens that were expected and those that were found."""
    names = {
        "routed_predicted_cached_tokens": "Cached tokens that routing expected of begun requests.",
        "routed_cached_tokens": "Cached tokens that the engines found for these.",
        "routed_wrong_cached_tokens": "Sum of the differences between both, without signs.",
    }
    expected, found, wrong = (metrics.counter_by(*name_help)() for name_help in names.items())

    def count(predicted: int, actual: int) -> None:
        expected.inc(predicted)
        found.inc(actual)
        wrong.inc(abs(predicted - actual))

    return count
