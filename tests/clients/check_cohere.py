"""Cohere's client for rerank, against a tiny reranker whose scores are those of transformers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import cohere
import pytest

from .conftest import KEY, in_venv, quire_serve

QUERY = "What do cats eat?"
DOCUMENTS = ["Cats eat fish.", "The sky is blue.", "Fish, mice and birds", "a"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[float]]]:
    """Yield the address of a server, and the expected score of each document."""
    folder = tmp_path_factory.mktemp("reranker")
    done = subprocess.run(
        in_venv("tiny_reranker", str(folder)),
        input=json.dumps({"query": QUERY, "documents": DOCUMENTS}),
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    arguments = [str(folder), "--served-model-name", "reranker", "--device", "cpu"]
    arguments += ["--kv-cache-dtype", "float32"]  # exact scores; the default has 16 bits
    with quire_serve(folder, *arguments) as address:
        yield address, json.loads(done.stdout)


def test_rerank_orders_the_documents(reranker: tuple[str, list[float]]) -> None:
    address, scores = reranker
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    client = cohere.ClientV2(api_key=KEY, base_url=address)
    answer = client.rerank(model="reranker", query=QUERY, documents=DOCUMENTS)
    assert [result.index for result in answer.results] == order
    for result in answer.results:
        assert result.relevance_score == pytest.approx(scores[result.index], abs=TOLERANCE)
    best = client.rerank(model="reranker", query=QUERY, documents=DOCUMENTS, top_n=2)
    assert [result.index for result in best.results] == order[:2]
    assert answer.id


async def test_the_async_client(reranker: tuple[str, list[float]]) -> None:
    address, scores = reranker
    client = cohere.AsyncClientV2(api_key=KEY, base_url=address)
    answer = await client.rerank(model="reranker", query=QUERY, documents=DOCUMENTS, top_n=1)
    (result,) = answer.results
    assert result.index == scores.index(max(scores))


def test_errors(reranker: tuple[str, list[float]]) -> None:
    address, _ = reranker
    client = cohere.ClientV2(api_key=KEY, base_url=address)
    with pytest.raises(cohere.NotFoundError):
        client.rerank(model="other", query=QUERY, documents=DOCUMENTS)
    with pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2(api_key="wrong", base_url=address).rerank(
            model="reranker", query=QUERY, documents=DOCUMENTS
        )
