"""The vectors of a tiny model over HTTP, against transformers and through the OpenAI client."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from transformers import AutoModel, AutoTokenizer

from quire.server.metrics.metrics import Metrics

from ..conftest import MODEL
from ..fakes import IM_END, ids
from ..real_engine import real_server
from ..test_metrics import TINY, read

PATH = "/v1/embeddings"
TEXTS = ["a", "the cat sat on the mat", "the cat sat on the mat, and slept " * 3]


@pytest.fixture(scope="module")
def served_model(embedding_model: Path) -> Iterator[tuple[str, Metrics]]:
    """Serve the tiny model; return the base URL and the metrics."""
    app, engine, metrics = real_server(
        embedding_model, num_gpu_blocks_override=40, max_num_batched_tokens=16
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", http="h11", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 30
    while not (server.started and engine.health().ready) and time.monotonic() < deadline:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", metrics
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def openai_client(served_model: tuple[str, Metrics]) -> Iterator[openai.OpenAI]:
    base_url, _ = served_model
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(embedding_model: Path) -> list[torch.Tensor]:
    """Compute the vectors that sentence-transformers gives for TEXTS, in plain torch."""
    tokenizer = AutoTokenizer.from_pretrained(embedding_model)
    model = AutoModel.from_pretrained(embedding_model, attn_implementation="eager").eval()
    vectors = []
    for text in TEXTS:
        token_ids = tokenizer(text).input_ids
        assert token_ids == [*ids(text), IM_END]
        with torch.no_grad():
            states = model(torch.tensor([token_ids])).last_hidden_state[0]
        vectors.append(torch.nn.functional.normalize(states[-1], dim=-1))
    return vectors


def assert_close(embedding: list[float], vector: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(embedding), vector, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}])
def test_the_openai_client_gets_the_reference_vectors(
    openai_client: openai.OpenAI, expected: list[torch.Tensor], options: dict[str, Any]
) -> None:
    """By default, the client requests base64 and decodes it."""
    answer = openai_client.embeddings.create(model=MODEL, input=TEXTS, **options)
    assert (answer.object, answer.model) == ("list", MODEL)
    assert [item.index for item in answer.data] == [0, 1, 2]
    for item, vector in zip(answer.data, expected, strict=True):
        assert_close(item.embedding, vector)
    num_tokens = sum(len(text) + 1 for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)


def test_shorter_vectors_have_unit_length(
    openai_client: openai.OpenAI, expected: list[torch.Tensor]
) -> None:
    answer = openai_client.embeddings.create(model=MODEL, input=TEXTS[1], dimensions=12)
    shorter = torch.nn.functional.normalize(expected[1][:12], dim=-1)
    assert_close(answer.data[0].embedding, shorter)
    with pytest.raises(openai.BadRequestError, match="have 32") as caught:
        openai_client.embeddings.create(model=MODEL, input=TEXTS[1], dimensions=33)
    assert caught.value.param == "dimensions"


def test_embeddings_and_generations_do_not_affect_each_other(
    served_model: tuple[str, Metrics], expected: list[torch.Tensor]
) -> None:
    """Running together changes neither vectors nor texts, and the metrics count both."""
    base_url, metrics = served_model
    generation = {"model": MODEL, "prompt": TEXTS[1], "max_tokens": 20, "temperature": 0}
    labels = TINY | {("finished_reason", "stop")}

    async def run() -> tuple[list[httpx.Response], list[httpx.Response]]:
        async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
            alone = await client.post("/v1/completions", json=generation)
            before = read(metrics)
            embeddings, generations = [], [alone]
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(client.post(PATH, json={"input": text})) for text in TEXTS
                ]
                others = [
                    group.create_task(client.post("/v1/completions", json=generation))
                    for _ in range(4)
                ]
            embeddings += [task.result() for task in tasks]
            generations += [task.result() for task in others]
            after = read(metrics)
        tokens = sum(len(text) + 1 for text in [*TEXTS, *[TEXTS[1]] * 4])
        counted = (
            after["quire:prompt_tokens_total", TINY] - before["quire:prompt_tokens_total", TINY]
        )
        assert counted == tokens
        name = "quire:request_success_total"
        generated = [response.json()["choices"][0]["finish_reason"] for response in generations[1:]]
        assert after[name, labels] - before[name, labels] == 3 + generated.count("stop")
        return embeddings, generations

    embeddings, generations = asyncio.run(run())
    for response, vector in zip(embeddings, expected, strict=True):
        assert_close(response.json()["data"][0]["embedding"], vector)
    assert len({response.json()["choices"][0]["text"] for response in generations}) == 1
