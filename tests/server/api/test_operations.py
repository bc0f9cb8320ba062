from __future__ import annotations

import asyncio
import socket

import httpx
import pytest

from quire.engine.embedding_spec import EmbeddingSpec
from quire.server.serving.app import EXPOSED_HEADERS
from quire.server.serving.main import announce
from quire.server.settings import load_settings

from ...documents import ROOT, code, tables
from ..conftest import MakeClient
from ..fakes import FakeEngineClient
from ..openai_http import COMPLETIONS, HI, PROMPT, assert_error


async def test_models_are_listed_and_found_by_name(make_client: MakeClient) -> None:
    client = make_client(served_model_name=("a/b", "c"))
    cards = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == ["a/b", "c"]
    assert cards[0]["max_model_len"] == 512
    assert (await client.get("/v1/models/a/b")).json() == cards[0]
    assert_error(await client.get("/v1/models/d"), 404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("GET", "/ready"), ("GET", "/ping"), ("POST", "/ping")],
)
async def test_health_is_200_only_while_the_model_serves(
    client: httpx.AsyncClient, engine: FakeEngineClient, method: str, path: str
) -> None:
    engine.ready = False
    response = await client.request(method, path)
    assert_error(response, 503, "engine_not_ready", None)
    assert "it loads" in response.json()["error"]["message"]
    engine.ready = True
    response = await client.request(method, path)
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_live_follows_the_engine(client: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    assert (await client.get("/live")).json()["status"] == "ok"
    engine.alive = engine.ready = False
    response = await client.get("/live")
    assert (response.status_code, response.json()["status"]) == (503, "failing")


async def test_load_counts_the_choices_that_clients_wait_for(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.hold = asyncio.Event()
    assert (await client.get("/load")).json() == {"server_load": 0}
    waiting = asyncio.create_task(client.post(COMPLETIONS, json={**PROMPT, "n": 3}))
    while not engine.requests:
        await asyncio.sleep(0.01)
    assert (await client.get("/load")).json() == {"server_load": 3}
    engine.hold.set()
    await waiting
    assert (await client.get("/load")).json() == {"server_load": 0}


async def test_server_info_shows_settings_but_no_keys(make_client: MakeClient) -> None:
    keys = {"api_key": ("client-key",), "admin_api_key": "admin-key"}
    client = make_client(**keys, max_num_seqs=7)
    response = await client.get("/server_info", headers={"authorization": "Bearer admin-key"})
    info = response.json()
    assert info["settings"]["max_num_seqs"] == 7
    assert info["engine"]["max_model_len"] == 512
    assert info["version"] and info["system_env"]["torch"]
    assert "client-key" not in response.text and "admin-key" not in response.text
    secret = {name for name in info["settings"] if "key" in name or "token" in name.split("_")}
    paths = {"ssl_keyfile", "api_keys_file", "node_key_file"}
    assert secret <= {*paths, "require_api_key"}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (PROMPT, "text_completion"),
        (HI, "chat.completion"),
        ({**PROMPT, "messages": None}, "text_completion"),
        ({"input": "a"}, "list"),
    ],
)
async def test_invocations_serve_each_kind_of_body(
    make_client: MakeClient, engine: FakeEngineClient, fields: dict[str, object], kind: str
) -> None:
    engine.embedding = EmbeddingSpec(pooling="last", size=4, normalize=True)
    client = make_client()
    response = await client.post("/invocations", json=fields)
    assert response.status_code == 200, response.text
    assert response.json()["object"] == kind


async def test_invocations_stream_and_refuse_as_the_endpoints_do(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post("/invocations", json={**HI, "stream": True})
    assert response.text.endswith("data: [DONE]\n\n")
    assert_error(
        await client.post("/invocations", json={"model": "tiny"}), 400, "invalid_value", "messages"
    )
    response = await client.post("/invocations", json={**HI, "temperature": 3})
    assert_error(response, 400, "invalid_value", "temperature")
    response = await client.post("/invocations", content=b"{", headers={"content-type": "text/x"})
    assert response.status_code == 415


async def test_pages_and_probes_answer_head(make_client: MakeClient) -> None:
    client = make_client(api_key=("key",))
    key = {"authorization": "Bearer key"}
    for path, status in (("/", 200), ("/health", 200), ("/ready", 200), ("/docs", 200)):
        assert (await client.head(path)).status_code == status
    for path in ("/docs", "/openapi.json", "/v1/models", "/v1/models/tiny", "/metrics"):
        response = await client.head(path, headers=key)
        assert response.status_code == 200 and response.content == b""
        assert (
            response.headers["content-type"]
            == ((await client.get(path, headers=key)).headers["content-type"])
        )
    response = await client.head(COMPLETIONS, headers=key)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    page = (await client.get("/metrics")).text
    assert 'http_requests_total{handler="/v1/models",method="HEAD",status="200"} 1.0' in page


@pytest.mark.parametrize("root", ["", "/llm", "/a/b/", "llm", "/"])
@pytest.mark.parametrize("stripped", [True, False])
async def test_paths_with_a_slash_at_the_end_and_behind_a_prefix(
    make_client: MakeClient, root: str, stripped: bool
) -> None:
    client = make_client(root_path=root)
    prefix = "" if stripped or not root.strip("/") else "/" + root.strip("/")
    for path in ("/v1/models", "/v1/models/", "/health/", "/v1/models/tiny/", "/", ""):
        assert (await client.get(prefix + path)).status_code == 200, path
    response = await client.post(f"{prefix}{COMPLETIONS}/", json=PROMPT)
    assert response.status_code == 200
    response = await client.get(f"{prefix}/v1/models//")
    assert response.status_code == 404


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("//v1/completions", "/v1/completions"),
        ("/v1/health", "/health"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/audio/speech", None),
        ("/v1", None),
        ("/" + "x" * 5000, None),
    ],
)
async def test_unknown_paths_are_answered_with_the_path_that_was_meant(
    make_client: MakeClient, path: str, meant: str | None
) -> None:
    for root in ("", "/llm"):
        client = make_client(root_path=root)
        response = await client.post(f"http://quire{root}{path}", json=PROMPT)
        assert_error(response, 404, "not_found", None)
        message = response.json()["error"]["message"]
        hint = "/docs lists all endpoints" if meant is None else f"did you mean {root}{meant}?"
        assert message.endswith(hint)


async def test_a_wrong_method_is_answered_with_all_that_are_allowed(
    client: httpx.AsyncClient,
) -> None:
    for method, path, allowed in (
        ("GET", COMPLETIONS, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/responses/resp_1", "DELETE, GET, HEAD"),
        ("DELETE", "/docs", "GET, HEAD"),
    ):
        response = await client.request(method, path)
        assert_error(response, 405, "method_not_allowed", None)
        assert response.headers["allow"] == allowed
        assert allowed in response.json()["error"]["message"]
    response = await client.get("/v1/messages")
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.json()["type"] == "error"


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


async def test_the_debug_view_tells_the_draft_model(
    engine: FakeEngineClient, make_client: MakeClient
) -> None:
    assert (await make_client().get("/debug/engine")).json()["draft_model"] is None
    drafted = make_client(speculative_model="org/small")
    assert (await drafted.get("/debug/engine")).json()["draft_model"] == {
        "model": "org/small",
        "num_bytes": 5,
        "kv_cache_bytes": 7 * 16 * engine.num_blocks,
    }


@pytest.mark.parametrize("model", [None, "org/small"])
def test_the_start_tells_the_draft_model(
    engine: FakeEngineClient, capsys: pytest.CaptureFixture[str], model: str | None
) -> None:
    settings = load_settings(speculative_model=model, log_format="console")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        announce(settings, engine.info, listener, 1.0)
    line = "  drafts    org/small, 0.0 MB, and 0.0 MB of K and V\n"
    assert (line in capsys.readouterr().err) == (model is not None)


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


PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang,openai-beta,"
    "anthropic-dangerous-direct-browser-access,x-quire-resumable",
}


@pytest.mark.parametrize("allowed", ["http://a", "*"])
async def test_cors_lets_through_whatever_headers_a_client_sends(
    make_client: MakeClient, allowed: str
) -> None:
    client = make_client(allowed_origins=(allowed,), api_key=("key",))
    response = await client.options(COMPLETIONS, headers={"origin": "http://a", **PREFLIGHT})
    assert response.status_code == 200
    asked = PREFLIGHT["access-control-request-headers"]
    assert response.headers["access-control-allow-headers"] == asked
    assert response.headers["access-control-allow-origin"] == allowed
    assert "access-control-allow-credentials" not in response.headers
    # An error is readable, too, and so are the headers that scripts need.
    response = await client.post(COMPLETIONS, headers={"origin": "http://a"}, json=PROMPT)
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == allowed
    assert "x-request-id" in response.headers["access-control-expose-headers"]


async def test_every_header_of_answers_in_the_documents_is_exposed() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    (rows,) = (rows for rows in tables(text) if tuple(rows[0])[:2] == ("header", "direction"))
    answered = {code(row["header"]).lower() for row in rows if row["direction"] != "request"}
    assert answered <= set(EXPOSED_HEADERS)


async def test_cors_only_for_allowed_origins(make_client: MakeClient) -> None:
    client = make_client(allowed_origins=("http://a",))
    for origin, expected in (("http://a", "http://a"), ("http://b", None)):
        response = await client.get("/version", headers={"origin": origin})
        assert response.headers.get("access-control-allow-origin") == expected
        response = await client.options(COMPLETIONS, headers={"origin": origin, **PREFLIGHT})
        assert response.headers.get("access-control-allow-origin") == expected
        assert response.status_code == (200 if expected else 400)
