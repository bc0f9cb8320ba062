"""The application: its routes, its middleware, and the lifespan that runs the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse

from ...engine.checkpoints.source import find_source
from ...engine.client import EngineClient
from ..about import quire_version
from ..api import adapters, chat, completions, embeddings, invocations, operations, tokenization
from ..api.stored_streams import router as streams_router
from ..dialects import conversations, messages, responses, responses_extra
from ..errors import install_handlers
from ..http.auth import require_client_key
from ..http.content_encoding import ContentEncodingMiddleware
from ..http.middleware import (
    BodyLimitMiddleware,
    ConnectionMiddleware,
    HeadMiddleware,
    HttpMetricsMiddleware,
    PathMiddleware,
    RequestIdMiddleware,
)
from ..http.route_docs import errors
from ..http.siblings import Siblings
from ..http.sse import cancel
from ..live import page, snapshots
from ..metrics.metrics import Metrics
from ..requests.state import ServerState
from ..scoring import classify, rerank
from ..settings import Settings
from ..tenants import rate_headers
from ..text.tokenizer import Tokenizer
from ..tracing.middleware import TracingMiddleware
from ..tracing.start import make_tracer
from .generation_defaults import load_generation_defaults
from .openapi import openapi_document
from .unknown_paths import explain_unknown_paths

if TYPE_CHECKING:
    from ..tracing.spans import Tracer

EXPOSED_HEADERS = (
    *("x-request-id", "x-quire-ignored-params", "x-quire-prompt-changes", "x-quire-stream-id"),
    "x-quire-engine",
    *("retry-after", "allow", "accept-encoding", "www-authenticate"),
    *rate_headers.NAMES,
)
"""Headers of answers that scripts of an allowed origin may read."""


def create_app(
    settings: Settings,
    engine: EngineClient,
    tokenizer: Tokenizer,
    metrics: Metrics,
    siblings: Siblings | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """Return the ASGI application; `app.state.quire` is its ServerState.

    Its lifespan starts the engine and closes it. The caller must call
    `app.state.quire.begin_drain()` when the server is told to stop, since the lifespan ends only
    after the last answer. Raises ConfigurationError for a bad generation_config, or if traces are
    asked for without OpenTelemetry. `tracer` takes the place of the one by the settings.
    """
    version = quire_version()
    tracer = tracer or make_tracer(settings, version)
    source = find_source(settings.model_path, settings.engine_config().gguf_file)
    defaults = load_generation_defaults(
        settings.generation_config, source.repository, source.sampling
    )
    state = ServerState(
        settings, engine, tokenizer, metrics, version, defaults, siblings or Siblings()
    )
    app = FastAPI(
        title="quire",
        version=version,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.quire = state
    app.state.tracer = tracer
    install_handlers(app)
    root, routers = _routers()
    app.router.routes.extend(root.routes)
    explain_unknown_paths(app, routers)
    _add_middleware(app, settings, metrics, tracer)
    return app


@cache
def _routers() -> tuple[APIRouter, list[APIRouter]]:
    """Return a router with all routes, and those that declare them. All applications of a process
    share them, since FastAPI takes some 20 ms to prepare them: tests make many applications."""
    endpoints = (
        *(completions, chat, responses, responses_extra, conversations, messages),
        *(embeddings, tokenization),
        *(rerank, classify, invocations),
    )
    private = [*(each.router for each in endpoints), streams_router]
    keyed = APIRouter(dependencies=[Depends(require_client_key)], responses=errors(401, 429))
    for router in private:
        keyed.include_router(router)
    public = [page.router, snapshots.public, operations.public, _documentation()]
    public += [operations.router, adapters.router]
    root = APIRouter(responses=errors(500))
    for router in (*public, keyed):
        root.include_router(router)
    return root, [*public, *private]


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ServerState = app.state.quire
    await state.engine.start()
    watching = None
    if state.key_source is not None and state.settings.api_keys_file is not None:
        watching = asyncio.create_task(state.key_source.watch(state.keys.ring.replace))
    try:
        yield
    finally:
        if watching is not None:
            await cancel(watching)
        state.begin_drain()
        await state.responses.close()
        state.grammar_check.close()
        await state.streams.close()
        await state.engine.close()
        if app.state.tracer is not None:
            await asyncio.to_thread(app.state.tracer.close)


def _add_middleware(
    app: FastAPI, settings: Settings, metrics: Metrics, tracer: Tracer | None
) -> None:
    # The middleware added last is the outermost.
    limit = int(settings.max_body_bytes)
    app.add_middleware(rate_headers.RateHeadersMiddleware)
    app.add_middleware(ConnectionMiddleware)
    app.add_middleware(ContentEncodingMiddleware, max_bytes=limit)
    app.add_middleware(BodyLimitMiddleware, max_bytes=limit)
    app.add_middleware(HeadMiddleware)
    if tracer is not None:
        app.add_middleware(TracingMiddleware, tracer=tracer)
    prefix = settings.root_path.strip("/")
    app.add_middleware(PathMiddleware, root_path=f"/{prefix}" if prefix else "")
    if settings.allowed_origins:
        # Keys are sent in headers and never in cookies, so credentials need not be allowed, and a
        # preflight may allow whatever headers a client's SDK sends.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(HttpMetricsMiddleware, metrics=metrics)
    app.add_middleware(RequestIdMiddleware)


def _documentation() -> APIRouter:
    """Return the routes of the OpenAPI document and of the page that shows it."""
    router = APIRouter(include_in_schema=False)

    @router.get("/openapi.json")
    async def openapi(request: Request) -> JSONResponse:
        return JSONResponse(openapi_document(request.app))

    @router.get("/docs")
    async def docs(request: Request) -> HTMLResponse:
        # A page of our own: FastAPI's loads its scripts from the internet.
        return HTMLResponse(files("quire.server.web").joinpath("docs.html").read_text("utf-8"))

    return router
