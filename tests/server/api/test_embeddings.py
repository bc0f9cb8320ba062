"""Embeddings over HTTP, with a fake engine: inputs, options and refusals."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from quire.engine.embedding_spec import NO_LAYOUT, EmbeddingSpec
from quire.server.metrics.metrics import Metrics
from quire.server.serving.app import create_app
from quire.server.settings import Settings
from quire.server.text.tokenizer import Tokenizer

from ..conftest import MODEL, MakeClient, app_client
from ..fakes import IM_END, FakeEngineClient, ids
from ..openai_http import assert_error

PATH = "/v1/embeddings"
SPEC = EmbeddingSpec(pooling="last", normalize=False, size=8)


@pytest.fixture
def embedder(engine: FakeEngineClient) -> FakeEngineClient:
    engine.embedding = SPEC
    return engine


def padded(*components: float) -> list[float]:
    return [*components, *[0.0] * (SPEC.size - len(components))]


@pytest.mark.parametrize(
    ("value", "vectors"),
    [
        ("a", [ids("a")]),
        (["a", "bc"], [ids("a"), ids("bc")]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        ("<|im_end|>", [[IM_END]]),
    ],
)
async def test_every_kind_of_input_is_embedded(
    client: httpx.AsyncClient, embedder: FakeEngineClient, value: Any, vectors: list[list[float]]
) -> None:
    response = await client.post(PATH, json={"model": MODEL, "input": value})
    assert response.status_code == 200, response.text
    tokens = sum(map(len, vectors))
    assert response.json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": padded(*vector)}
            for index, vector in enumerate(vectors)
        ],
        "model": MODEL,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    assert not embedder.running


async def test_base64_encodes_little_endian_float32(
    client: httpx.AsyncClient, embedder: FakeEngineClient
) -> None:
    fields = {"input": [3, 4], "encoding_format": "base64"}
    response = await client.post(PATH, json=fields)
    data = base64.b64decode(response.json()["data"][0]["embedding"])
    assert np.frombuffer(data, "<f4").tolist() == padded(3.0, 4.0)


async def test_vectors_are_normalised_after_they_are_shortened(
    client: httpx.AsyncClient, embedder: FakeEngineClient
) -> None:
    embedder.embedding = EmbeddingSpec(
        pooling="mean", normalize=True, size=8, is_matryoshka=True, matryoshka_dimensions=(2,)
    )
    fields: dict[str, Any] = {"input": [3, 4, 12]}
    (whole,) = (await client.post(PATH, json=fields)).json()["data"]
    assert whole["embedding"] == pytest.approx(padded(3 / 13, 4 / 13, 12 / 13))
    (shorter,) = (await client.post(PATH, json={**fields, "dimensions": 2})).json()["data"]
    assert shorter["embedding"] == pytest.approx([0.6, 0.8])
    response = await client.post(PATH, json={**fields, "dimensions": 3})
    assert_error(response, 400, "invalid_value", "dimensions")


async def test_the_fields_reach_the_engine(
    client: httpx.AsyncClient, embedder: FakeEngineClient
) -> None:
    embedder.embedding = EmbeddingSpec(pooling="max", normalize=False, size=8, prompt="q: ")
    fields = {"input": "a", "priority": 3, "cache_salt": "s", "timeout": 9.0, "user": "u"}
    assert (await client.post(PATH, json={**fields, "input": ["a", "b"]})).status_code == 200
    assert (await client.post(PATH, json={**fields, "input": [7]})).status_code == 200
    assert (await client.post(PATH, json={**fields, "user": "v"})).status_code == 200
    first, second, third, other = embedder.requests
    assert first.user == second.user == third.user != other.user
    assert [request.prompt_token_ids for request in (first, second, third)] == [
        tuple(ids("q: a")),
        tuple(ids("q: b")),
        (7,),
    ]
    for request in (first, second, third):
        assert (request.pooling, request.priority, request.cache_salt) == ("max", 3, "salt s")
        assert request.deadline == pytest.approx(request.arrival_time + 9)


async def test_truncation_keeps_the_beginning(
    embedding_model: Path, embedder: FakeEngineClient
) -> None:
    """The special tokens that end a text are kept as well."""
    app = create_app(
        Settings(served_model_name=(MODEL,), generation_config="none"),
        embedder,
        Tokenizer.load(str(embedding_model)),
        Metrics(MODEL),
    )
    async with app_client(app) as client:

        async def kept(**fields: Any) -> tuple[int, ...]:
            response = await client.post(PATH, json={"input": "abcdef", **fields})
            assert response.status_code == 200, response.text
            return embedder.requests[-1].prompt_token_ids

        assert await kept() == (*ids("abcdef"), IM_END)
        assert await kept(truncate_prompt_tokens=3) == (*ids("ab"), IM_END)
        assert await kept(truncate_prompt_tokens=7) == (*ids("abcdef"), IM_END)
        assert await kept(truncate_prompt_tokens=-1) == (*ids("abcdef"), IM_END)
        plain = await kept(truncate_prompt_tokens=3, add_special_tokens=False)
        assert plain == tuple(ids("abc"))
        assert await kept(truncate_prompt_tokens=2, input=[5, 6, 7]) == (5, 6)
        left: dict[str, Any] = {"truncation_side": "left"}
        assert await kept(truncate_prompt_tokens=3, **left) == (*ids("ef"), IM_END)
        assert await kept(truncate_prompt_tokens=9, **left) == (*ids("abcdef"), IM_END)
        assert await kept(truncate_prompt_tokens=2, input=[5, 6, 7], **left) == (6, 7)
        assert await kept(**left) == (*ids("abcdef"), IM_END)
        long = await kept(truncate_prompt_tokens=-1, input="a" * 10**6)
        assert long == (*ids("a") * (embedder.max_model_len - 1), IM_END)
        response = await client.post(PATH, json={"input": "a", "truncate_prompt_tokens": 1})
        assert_error(response, 400, "invalid_value", "truncate_prompt_tokens")


@pytest.mark.parametrize("value", ["a", ["a", "b"], [0, 1], [[0], [1, 2]]])
@pytest.mark.parametrize("reason", [NO_LAYOUT, "pooling by cls is not supported"])
async def test_models_that_make_no_embeddings_say_why(
    client: httpx.AsyncClient, engine: FakeEngineClient, value: Any, reason: str
) -> None:
    engine.embedding = reason
    fields = {"model": MODEL, "input": value, "encoding_format": "base64", "dimensions": 8}
    response = await client.post(PATH, json=fields)
    assert_error(response, 400, "invalid_value", "model")
    assert response.json()["error"]["message"].endswith(f"does not produce embeddings: {reason}")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[1], []]}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["a", 3]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [[1], [258]]}, "input"),
        ({"input": ["a"] * 257}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"dimensions": 4}, "dimensions"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 513}, "truncate_prompt_tokens"),
        ({"add_special_tokens": 1}, "add_special_tokens"),
        ({"priority": 2**31}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"timeout": 0}, "timeout"),
        ({"user": "u" * 129}, "user"),
    ],
)
async def test_bad_fields_are_named(
    client: httpx.AsyncClient, embedder: FakeEngineClient, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(PATH, json={"model": MODEL, "input": "a", **fields})
    assert_error(response, 400, "invalid_value", param)
    assert not embedder.requests


@pytest.mark.parametrize("value", ["a" * 513, [1] * 513, ["a", "a" * 10**6], [[1], [1] * 600]])
async def test_inputs_longer_than_the_context_are_refused(
    client: httpx.AsyncClient, embedder: FakeEngineClient, value: Any
) -> None:
    response = await client.post(PATH, json={"input": value})
    assert_error(response, 400, "context_length_exceeded", "input")
    assert "prompt" not in response.json()["error"]["message"]
    response = await client.post(PATH, json={"input": "a" * 512})
    assert response.status_code == 200


async def test_inputs_larger_than_the_kv_cache_are_refused(
    client: httpx.AsyncClient, embedder: FakeEngineClient
) -> None:
    embedder.num_blocks = 2
    response = await client.post(PATH, json={"input": "a" * 33})
    assert_error(response, 400, "kv_pool_too_small", "input")
    assert "input needs more KV cache" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a"}),
    ],
)
async def test_weights_without_a_head_refuse_to_generate(
    client: httpx.AsyncClient, embedder: FakeEngineClient, path: str, fields: dict[str, Any]
) -> None:
    embedder.can_generate = False
    response = await client.post(path, json=fields)
    assert_error(response, 400, "invalid_value", "model")
    assert "no language-model head" in response.json()["error"]["message"]
    assert (await client.post(PATH, json={"input": "a"})).status_code == 200


async def test_unknown_models_unknown_fields_and_an_engine_that_is_not_ready(
    make_client: MakeClient, embedder: FakeEngineClient
) -> None:
    fields: dict[str, Any] = {"model": "other", "input": "a"}
    client = make_client()
    assert_error(await client.post(PATH, json=fields), 404, "model_not_found", "model")
    fields = {"model": MODEL, "input": "a", "mood": 1}
    response = await client.post(PATH, json=fields)
    assert (response.status_code, response.headers["x-quire-ignored-params"]) == (200, "mood")
    strict = make_client(strict=True)
    assert_error(await strict.post(PATH, json=fields), 400, "invalid_value", "mood")
    embedder.ready = False
    assert (await client.post(PATH, json={"input": "a"})).status_code == 503
    in_flight = client.app.state.quire.in_flight  # type: ignore[attr-defined]
    assert (in_flight.num_queued, in_flight.num_running, in_flight.queued_tokens) == (0, 0, 0)


async def test_a_deadline_ends_an_embedding_request(
    client: httpx.AsyncClient, embedder: FakeEngineClient
) -> None:
    embedder.hold = asyncio.Event()
    response = await client.post(PATH, json={"input": ["a", "b"], "timeout": 0.05})
    assert response.status_code == 504
    assert not embedder.running
    assert {request_id for request_id, _ in embedder.aborted} == {
        request.request_id for request in embedder.requests
    }
