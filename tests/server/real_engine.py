"""Applications with a real engine in this process, for tiny models on the CPU."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from fastapi import FastAPI

from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.runner.worker import Worker
from quire.server.metrics.metrics import Metrics
from quire.server.serving.app import create_app
from quire.server.settings import Settings
from quire.server.text.tokenizer import Tokenizer

from ..engine.inline_client import InlineEngineClient
from .conftest import MODEL, app_client


class RealServer(NamedTuple):
    """An application and its engine, not started yet."""

    app: FastAPI
    engine: InlineEngineClient
    metrics: Metrics


def make_core(config: EngineConfig) -> EngineCore:
    return EngineCore(config, Worker(config))


def real_server(folder: Path, **settings: Any) -> RealServer:
    """Make the server of a model's folder, which has a tokenizer."""
    values = Settings(
        model=str(folder),
        served_model_name=(MODEL,),
        **{"device": "cpu", "dtype": "float32", "num_threads": 1, **settings},
    )
    metrics = Metrics(MODEL)
    engine = InlineEngineClient(values.engine_config(), make_core, observer=metrics)
    app = create_app(values, engine, Tokenizer.load(str(folder)), metrics)
    return RealServer(app, engine, metrics)


@asynccontextmanager
async def running(app: FastAPI, engine: InlineEngineClient) -> AsyncIterator[httpx.AsyncClient]:
    """Start the engine, yield a client of the application, and close both."""
    await engine.start()
    try:
        await engine.wait_ready()
        async with app_client(app) as client:
            yield client
    finally:
        await engine.close()
