from __future__ import annotations

import httpx

from ..conftest import MakeClient
from ..fakes import FakeEngineClient
from ..openai_http import COMPLETIONS, PROMPT, assert_error


async def test_models_are_listed_and_found_by_name(make_client: MakeClient) -> None:
    client = make_client(served_model_name=("a/b", "c"))
    cards = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == ["a/b", "c"]
    assert cards[0]["max_model_len"] == 512
    assert (await client.get("/v1/models/a/b")).json() == cards[0]
    assert_error(await client.get("/v1/models/d"), 404, "model_not_found", "model")


async def test_health_follows_the_engine(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).json() == {"status": "ready"}
    engine.alive = False
    response = await client.get("/health")
    assert (response.status_code, response.json()["status"]) == (503, "failing")


async def test_pages_and_probes_answer_head(make_client: MakeClient) -> None:
    client = make_client(api_key=("key",))
    key = {"authorization": "Bearer key"}
    for path, status in (("/", 200), ("/health", 200), ("/ready", 200), ("/docs", 401)):
        assert (await client.head(path)).status_code == status
    for path in ("/docs", "/openapi.json"):
        assert (await client.head(path, headers=key)).status_code == 200
    assert (await client.head("/v1/models", headers=key)).status_code == 405


async def test_the_debug_view_shows_every_block_free_after_a_request(
    client: httpx.AsyncClient,
) -> None:
    await client.post(COMPLETIONS, json=PROMPT)
    debug = (await client.get("/debug/engine")).json()
    assert debug["stats"]["num_free_blocks"] == debug["stats"]["num_blocks"]
    assert debug["stats"]["kv_usage"] == 0
    assert debug["stats"]["num_running"] == debug["stats"]["num_waiting"] == 0


async def test_the_debug_view_tells_the_weights(client: httpx.AsyncClient) -> None:
    assert (await client.get("/debug/engine")).json()["weights"] == {
        "source_format": "GGUF Q4_0",
        "computed_format": "4-bit groups",
        "num_parameters": 1,
        "num_bytes": 3,
    }


async def test_pages_are_served(client: httpx.AsyncClient) -> None:
    assert "text/html" in (await client.get("/")).headers["content-type"]
    assert "openapi.json" in (await client.get("/docs")).text
    assert "/v1/completions" in (await client.get("/openapi.json")).json()["paths"]
    assert (await client.get("/version")).json()["version"]


async def test_metrics_count_requests_and_latencies(client: httpx.AsyncClient) -> None:
    await client.post(COMPLETIONS, json={**PROMPT, "n": 2, "max_tokens": 5})
    page = (await client.get("/metrics")).text
    labels = 'engine="0",model_name="tiny"'
    for line in (
        f"quire:prompt_tokens_total{{{labels}}} 1.0",
        f"quire:generation_tokens_total{{{labels}}} 10.0",
        f"quire:time_to_first_token_seconds_count{{{labels}}} 1.0",
        f"quire:inter_token_latency_seconds_count{{{labels}}} 8.0",
        'quire:request_success_total{engine="0",finished_reason="length",model_name="tiny"} 2.0',
    ):
        assert line in page, line


async def test_cors_only_for_allowed_origins(make_client: MakeClient) -> None:
    client = make_client(allowed_origins=("http://a",))
    for origin, expected in (("http://a", "http://a"), ("http://b", None)):
        response = await client.get("/version", headers={"origin": origin})
        assert response.headers.get("access-control-allow-origin") == expected
