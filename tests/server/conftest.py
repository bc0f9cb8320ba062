from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from quire.server.metrics.metrics import Metrics
from quire.server.serving.app import create_app
from quire.server.settings import Settings
from quire.server.text.tokenizer import Tokenizer

from .fakes import FakeEngineClient, byte_tokenizer

MODEL = "tiny"
MakeClient = Callable[..., httpx.AsyncClient]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient()


def make_app(engine: FakeEngineClient, tokenizer: Tokenizer, **settings: Any) -> FastAPI:
    values = {"served_model_name": (MODEL,), "generation_config": "none", **settings}
    return create_app(Settings(**values), engine, tokenizer, Metrics(MODEL))


def app_client(app: Any) -> httpx.AsyncClient:
    """Return a client of an application, through which its exceptions reach the test."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://quire")


@pytest.fixture
async def make_client(engine: FakeEngineClient, tokenizer: Tokenizer) -> AsyncIterator[MakeClient]:
    """Return a function that makes a client of an application with the fake engine and settings."""
    clients: list[httpx.AsyncClient] = []

    def make(**settings: Any) -> httpx.AsyncClient:
        app = make_app(engine, tokenizer, **settings)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://quire")
        client.app = app  # type: ignore[attr-defined]
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
def client(make_client: MakeClient) -> httpx.AsyncClient:
    return make_client()


@pytest.fixture
def served(engine: FakeEngineClient, tokenizer: Tokenizer) -> Iterator[str]:
    """Serve the application with uvicorn; return its base URL."""
    app = make_app(engine, tokenizer, api_key=("secret",), sse_keepalive_interval=0.05)
    config = uvicorn.Config(app, port=0, log_level="error", http="h11", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)
    assert engine.started and engine.closed
