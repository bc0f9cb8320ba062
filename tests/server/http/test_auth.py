from __future__ import annotations

from typing import Any

import httpx
import pytest

from ..conftest import MODEL, MakeClient
from ..fakes import FakeEngineClient
from ..openai_http import assert_error

OPEN = {"/", "/health", "/ready", "/live", "/ping", "/load", "/metrics", "/version"} | {
    *("/docs", "/openapi.json"),
}
ADMIN_CALLS = {"/v1/prefix_cache/reset", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
ADMIN = {*ADMIN_CALLS, "/debug/engine", "/debug/live", "/server_info"}
KEYS: dict[str, Any] = {"api_key": ("one", "two"), "admin_api_key": "boss"}


async def ask(client: httpx.AsyncClient, method: str, path: str, **headers: str) -> httpx.Response:
    return await client.request(
        method,
        path.replace("{name}", "tiny"),
        headers=headers,
        json={} if method == "POST" else None,
    )


def routes(client: httpx.AsyncClient) -> list[tuple[str, str]]:
    paths = client.app.openapi()["paths"]  # type: ignore[attr-defined]
    described = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    assert len(described) > 12
    return [*described, ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json")]


async def test_every_route_but_the_public_ones_requires_a_key(make_client: MakeClient) -> None:
    client = make_client(**KEYS)
    bad = [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer " + "x" * 2**20},
        {"Authorization": "Bearer "},
        {"Authorization": "one"},
        {"Authorization": "Basic one"},
        {"Authorization": "Bearer wrong", "Host": "quire/health"},
        {"x-api-key": "wrong"},
        {"x-api-key": ""},
    ]
    for method, path in routes(client):
        for headers in bad:
            response = await ask(client, method, path, **headers)
            if path in OPEN:
                assert response.status_code == 200, path
            else:
                if path.startswith("/v1/messages"):
                    assert response.status_code == 401
                    assert response.json()["error"]["type"] == "authentication_error"
                else:
                    assert_error(response, 401, "invalid_api_key", None)
                assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["one", "two", "boss"])
async def test_each_key_opens_only_its_own_routes(make_client: MakeClient, key: str) -> None:
    client = make_client(**KEYS)
    for method, path in routes(client):
        response = await ask(client, method, path, Authorization=f"Bearer {key}")
        other = await ask(client, method, path, **{"x-api-key": key})
        refused = path in ADMIN and key != "boss"
        assert (response.status_code == 401) == refused, path
        assert (other.status_code == 401) == refused, path


async def test_without_keys_everything_but_admin_calls_is_open(make_client: MakeClient) -> None:
    client = make_client()
    for method, path in routes(client):
        response = await ask(client, method, path)
        assert (response.status_code == 401) == (path in ADMIN_CALLS), path


async def test_the_debug_view_is_closed_if_only_clients_have_keys(
    make_client: MakeClient,
) -> None:
    client = make_client(api_key=("one",))
    for key in ("one", ""):
        response = await ask(client, "GET", "/debug/engine", Authorization=f"Bearer {key}")
        assert response.status_code == 401


async def test_the_admin_key_resets_the_prefix_cache(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    client = make_client(admin_api_key="boss")
    response = await ask(client, "POST", "/v1/prefix_cache/reset", Authorization="Bearer boss")
    assert response.json() == {"status": "ok"}
    assert engine.resets == 1


async def test_fair_scheduling_counts_requests_by_user_and_key(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    client = make_client(api_key=("one", "two"), scheduling_policy="fair")
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"model": MODEL, "prompt": "hi"},
        "/v1/chat/completions": chat,
        "/v1/responses": {"model": MODEL, "input": "hi"},
    }

    async def account(path: str, key: str, fields: dict[str, Any]) -> str:
        headers = {"authorization": f"Bearer {key}"}
        response = await client.post(path, json=fields, headers=headers)
        assert response.status_code == 200, response.text
        user = engine.requests[-1].user
        assert user is not None and key not in user
        return user

    seen = set()
    for user in (None, "u1", "u2"):
        for key in ("one", "two"):
            [same] = {await account(path, key, {**bodies[path], "user": user}) for path in bodies}
            seen.add(same)
    assert len(seen) == 6
    message = {**chat, "max_tokens": 4, "metadata": {"user_id": "u" * 500}}
    first = await account("/v1/messages", "one", message)
    assert first == await account("/v1/messages", "one", message)
    message["metadata"] = {"user_id": "u" * 499}
    assert first != await account("/v1/messages", "one", message)
