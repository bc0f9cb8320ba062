from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from quire.server.app import create_app
from quire.server.metrics import Metrics
from quire.server.settings import Settings
from quire.server.tokenizer import Tokenizer

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


@pytest.fixture
async def make_client(engine: FakeEngineClient, tokenizer: Tokenizer) -> AsyncIterator[MakeClient]:
    """A client of an application with the given settings, around the fake engine."""
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
