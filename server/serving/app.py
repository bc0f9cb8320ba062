"""The application: its routes, its middleware, and the lifespan that runs the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version as package_version
from importlib.resources import files

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse

from ...engine.client import EngineClient
from ..api import adapters, chat, completions, embeddings, operations, tokenization
from ..api.stored_streams import router as streams_router
from ..dialects import messages, responses
from ..errors import install_handlers
from ..http.auth import require_client_key
from ..http.middleware import BodyLimitMiddleware, HttpMetricsMiddleware, RequestIdMiddleware
from ..http.route_docs import errors
from ..http.siblings import Siblings
from ..metrics import Metrics
from ..requests.sampling import load_generation_defaults
from ..requests.state import ServerState
from ..settings import Settings
from ..text.tokenizer import Tokenizer
from .openapi import openapi_document


def create_app(
    settings: Settings,
    engine: EngineClient,
    tokenizer: Tokenizer,
    metrics: Metrics,
    siblings: Siblings | None = None,
) -> FastAPI:
    """Return the ASGI application; `app.state.quire` is its ServerState.

    Its lifespan starts the engine and closes it. The caller must call
    `app.state.quire.begin_drain()` when the server is told to stop, since the lifespan ends only
    after the last answer. Raises ConfigurationError for a bad generation_config.
    """
    version = package_version("quire")
    defaults = load_generation_defaults(settings.generation_config, settings.model_path)
    state = ServerState(
        settings, engine, tokenizer, metrics, version, defaults, siblings or Siblings()
    )
    app = FastAPI(
        title="quire",
        version=version,
        lifespan=_lifespan,
        root_path=settings.root_path,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        responses=errors(500),
    )
    app.state.quire = state
    install_handlers(app)
    keyed = APIRouter(dependencies=[Depends(require_client_key)], responses=errors(401))
    for endpoints in (completions, chat, responses, messages, embeddings, tokenization):
        keyed.include_router(endpoints.router)
    keyed.include_router(_documentation())
    keyed.include_router(streams_router)
    for router in (operations.public, operations.router, adapters.router, keyed):
        app.include_router(router)
    _add_middleware(app, settings, metrics)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ServerState = app.state.quire
    await state.engine.start()
    try:
        yield
    finally:
        state.begin_drain()
        await state.responses.close()
        state.grammar_check.close()
        await state.streams.close()
        await state.engine.close()


def _add_middleware(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    # The middleware added last is the outermost.
    app.add_middleware(BodyLimitMiddleware, max_bytes=int(settings.max_body_bytes))
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "X-Request-ID",
                "X-API-Key",
                "Anthropic-Version",
                "X-Quire-Resumable",
                "Last-Event-ID",
            ],
            expose_headers=["x-request-id", "x-quire-ignored-params", "x-quire-stream-id"],
        )
    app.add_middleware(HttpMetricsMiddleware, metrics=metrics)
    app.add_middleware(RequestIdMiddleware)


def _documentation() -> APIRouter:
    """Return the routes of the OpenAPI document and of the page that shows it."""
    router = APIRouter(include_in_schema=False)

    @router.head("/openapi.json")
    @router.get("/openapi.json")
    async def openapi(request: Request) -> JSONResponse:
        return JSONResponse(openapi_document(request.app))

    @router.head("/docs")
    @router.get("/docs")
    async def docs(request: Request) -> HTMLResponse:
        # A page of our own: FastAPI's loads its scripts from the internet.
        return HTMLResponse(files("quire.server.web").joinpath("docs.html").read_text("utf-8"))

    return router
