"""Test which adapters HTTP clients see, select, load and unload; the engine is a fake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.engine.embedding_spec import EmbeddingSpec
from quire.engine.lora import AdapterSource

from ..conftest import MODEL, MakeClient
from ..fakes import FakeEngineClient
from ..openai_http import assert_error

ADMIN = {"authorization": "Bearer admin"}
JSON = {"content-type": "application/json"}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A folder of adapters, and one beside it, which must not be read."""
    for folder in (tmp_path / "adapters" / "sql", tmp_path / "secret"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text("")
    return tmp_path / "adapters"


@pytest.fixture
def admin(make_client: MakeClient, adapters: Path) -> Iterator[httpx.AsyncClient]:
    client = make_client(admin_api_key="admin", lora_dir=adapters)
    client.headers.update(ADMIN)
    yield client


async def test_adapters_are_listed_with_their_parent(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    engine.adapters["a/sql"] = AdapterSource("a/sql", "/adapters/sql")
    client = make_client()
    base, card = (await client.get("/v1/models")).json()["data"]
    assert (base["id"], base["parent"]) == (MODEL, None)
    assert (card["id"], card["parent"], card["root"]) == ("a/sql", MODEL, "/adapters/sql")
    assert card["max_model_len"] == base["max_model_len"]
    assert (await client.get("/v1/models/a/sql")).json() == card
    assert_error(await client.get("/v1/models/sql"), 404, "model_not_found", "model")


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/v1/responses": {"input": "hi", "max_output_tokens": 16},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/v1/embeddings": {"input": "hi"},
}


@pytest.mark.parametrize("path", BODIES)
async def test_the_model_of_a_request_selects_an_adapter(
    make_client: MakeClient, engine: FakeEngineClient, path: str
) -> None:
    engine.embedding = EmbeddingSpec(size=4, pooling="last", normalize=False)
    engine.adapters["sql"] = AdapterSource("sql", "/adapters/sql")
    client = make_client()
    for model, adapter in ((MODEL, None), ("sql", "sql")):
        answer = await client.post(path, json={"model": model, **BODIES[path]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        assert engine.requests[-1].adapter == adapter
    answer = await client.post(path, json={"model": "other", **BODIES[path]})
    assert answer.status_code == 404 and "'other'" in answer.text


async def test_fingerprints_differ(make_client: MakeClient, engine: FakeEngineClient) -> None:
    engine.adapters["sql"] = AdapterSource("sql", "/adapters/sql")
    client, seen = make_client(), set()
    for model in (MODEL, "sql", MODEL):
        body = {"model": model, **BODIES["/v1/completions"]}
        seen.add((await client.post("/v1/completions", json=body)).json()["system_fingerprint"])
    assert len(seen) == 2


async def test_an_adapter_is_loaded_replaced_and_unloaded(
    admin: httpx.AsyncClient, engine: FakeEngineClient, adapters: Path
) -> None:
    for path in ("sql", str(adapters / "sql")):
        body = {"lora_name": "db", "lora_path": path, "load_inplace": True}
        answer = await admin.post(LOAD, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.text == "Success: LoRA adapter 'db' added successfully."
        assert engine.adapters == {"db": AdapterSource("db", str(adapters / "sql"))}
    again = await admin.post(LOAD, json={"lora_name": "db", "lora_path": "sql"})
    assert_error(again, 400, "invalid_value", "lora_name")
    answer = await admin.post(UNLOAD, json={"lora_name": "db"})
    assert answer.text == "Success: LoRA adapter 'db' removed successfully."
    gone = await admin.post(UNLOAD, json={"lora_name": "db"})
    assert_error(gone, 404, "model_not_found", "lora_name")
    strange = await admin.post(UNLOAD, content=b'{"lora_name": "\\ud800"}', headers=JSON)
    assert strange.status_code in (400, 404)


async def test_only_the_admin_changes_adapters(make_client: MakeClient, adapters: Path) -> None:
    body = {"lora_name": "db", "lora_path": "sql"}
    keyed = make_client(api_key=("client",), admin_api_key="admin", lora_dir=adapters)
    for client, key in ((keyed, "client"), (keyed, "x"), (make_client(lora_dir=adapters), "admin")):
        for path in (LOAD, UNLOAD):
            headers = {"authorization": f"Bearer {key}"}
            answer = await client.post(path, json=body, headers=headers)
            assert_error(answer, 401, "invalid_api_key", None)


async def test_paths_outside_the_folder_are_refused(
    admin: httpx.AsyncClient, engine: FakeEngineClient, adapters: Path
) -> None:
    secret = adapters.parent / "secret"
    (adapters / "link").symlink_to(secret)
    (adapters / "inside").symlink_to(adapters / "sql")
    linked = adapters / "linked"
    linked.mkdir()
    (linked / "adapter_config.json").symlink_to(secret / "adapter_config.json")
    (adapters / "file").write_text("")
    for path in (
        "../secret",
        "sql/../../secret",
        "sql/../sql",
        str(secret),
        "/",
        "/etc",
        "link",
        "link/.",
        "inside",
        "linked",
        "file",
        "nothing",
        "x" * 5000,
        "sql\0",
        "sql\n",
        "~",
        str(adapters) + "2",
    ):
        answer = await admin.post(LOAD, json={"lora_name": "db", "lora_path": path})
        assert_error(answer, 400, "invalid_value", "lora_path")
        assert "secret" not in answer.text
    assert engine.adapters == {}


async def test_without_a_folder_nothing_is_loaded(make_client: MakeClient) -> None:
    client = make_client(admin_api_key="admin")
    answer = await client.post(LOAD, json={"lora_name": "db", "lora_path": "/tmp"}, headers=ADMIN)
    assert_error(answer, 400, "invalid_value", "lora_path")
    assert "--lora-dir" in answer.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": MODEL, "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "", "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "a\n", "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "a" * 129, "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "db", "lora_path": ""}, "lora_path"),
        ({"lora_name": "db"}, "lora_path"),
        ({"lora_name": 1, "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "db", "lora_path": "sql", "load_inplace": "yes"}, "load_inplace"),
    ],
)
async def test_bad_bodies_are_refused(
    admin: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    assert_error(await admin.post(LOAD, json=body), 400, "invalid_value", param)


@pytest.mark.parametrize("field", ["lora_name", "lora_path"])
async def test_what_no_file_name_can_hold_is_refused(
    admin: httpx.AsyncClient, engine: FakeEngineClient, field: str
) -> None:
    fields = {"lora_name": '"db"', "lora_path": '"sql"'} | {field: '"\\ud800"'}
    content = ", ".join(f'"{name}": {value}' for name, value in fields.items())
    answer = await admin.post(LOAD, content=f"{{{content}}}", headers=JSON)
    assert answer.status_code == 400 and engine.adapters == {}


async def test_before_the_engine_is_ready_configured_adapters_are_known(
    make_client: MakeClient, engine: FakeEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quire.engine.errors import EngineNotReadyError

    def not_ready(self: FakeEngineClient) -> Any:
        raise EngineNotReadyError("the engine is starting")

    monkeypatch.setattr(FakeEngineClient, "info", property(not_ready))
    engine.ready = False
    client = make_client(lora=("sql=/adapters/sql",), admin_api_key="admin")
    assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == [
        MODEL,
        "sql",
    ]
    body = {"model": "sql", **BODIES["/v1/completions"]}
    assert (await client.post("/v1/completions", json=body)).status_code == 503
    answer = await client.post(UNLOAD, json={"lora_name": "sql"}, headers=ADMIN)
    assert answer.status_code == 503
