"""Conversations: created, continued by responses, listed, changed and deleted."""

from __future__ import annotations

from typing import Any

import httpx
import openai
from openai.types.conversations import Conversation, ConversationItemList

from quire.server.text.tokenizer import Tokenizer

from ..conftest import MakeClient
from ..fakes import FakeEngineClient, prompt_text, say
from ..openai_http import assert_error
from .test_responses import HI, PATH, create, stream

CONVERSATIONS = "/v1/conversations"
HELLO: dict[str, Any] = {"type": "message", "role": "user", "content": "hello"}


async def begin(client: httpx.AsyncClient, **fields: Any) -> str:
    """Create a conversation; return its path."""
    response = await client.post(CONVERSATIONS, json=fields)
    assert response.status_code == 200, response.text
    Conversation.model_validate(response.json())
    return f"{CONVERSATIONS}/{response.json()['id']}"


async def texts(client: httpx.AsyncClient, path: str) -> list[str]:
    listed = (await client.get(f"{path}/items", params={"order": "asc"})).json()
    ConversationItemList.model_validate(listed)
    return [item["content"][0]["text"] for item in listed["data"]]


async def test_a_conversation_grows_by_its_responses(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    path = await begin(client, items=[HELLO], metadata={"a": "b"})
    name = path.rsplit("/", 1)[1]
    engine.scripts = say("First.")
    answer = await create(client, conversation=name)
    assert answer["conversation"] == {"id": name}
    assert "user\nhello<" in prompt_text(engine, tokenizer)
    engine.scripts = say("Second.")
    await stream(client, conversation={"id": name}, input="more", store=False)
    text = prompt_text(engine, tokenizer)
    for part in ("user\nhello", "user\nhi", "assistant\nFirst.", "user\nmore"):
        assert text.count(part) == 1, part
    assert await texts(client, path) == ["hello", "hi", "First.", "more", "Second."]
    engine.scripts = say("cut off")
    await create(client, conversation=name, input="x", max_output_tokens=3)
    assert (await texts(client, path))[-1] == "cut"


async def test_items_and_metadata_are_changed(client: httpx.AsyncClient) -> None:
    path = await begin(client)
    added = (await client.post(f"{path}/items", json={"items": [HELLO, HELLO]})).json()
    assert len(added["data"]) == 2
    [first, second] = [item["id"] for item in added["data"]]
    item = (await client.get(f"{path}/items/{first}")).json()
    assert item["content"] == [{"type": "input_text", "text": "hello"}]
    assert (await client.delete(f"{path}/items/{first}")).json()["object"] == "conversation"
    listed = (await client.get(f"{path}/items")).json()
    assert [item["id"] for item in listed["data"]] == [second]
    changed = (await client.post(path, json={"metadata": {"x": "y"}})).json()
    assert changed["metadata"] == {"x": "y"}
    assert (await client.get(path)).json() == changed
    assert (await client.delete(path)).json()["deleted"] is True
    for method, url in (("GET", path), ("DELETE", path), ("GET", f"{path}/items")):
        assert_error(await client.request(method, url), 404, "not_found", None)


async def test_what_is_refused(make_client: MakeClient, engine: FakeEngineClient) -> None:
    client = make_client(max_stored_response_bytes=2000)
    path = await begin(client)
    name = path.rsplit("/", 1)[1]
    for fields, param in (
        ({"conversation": "conv_none"}, "conversation"),
        ({"conversation": 3}, "conversation"),
        ({"conversation": name, "previous_response_id": "resp_1"}, "conversation"),
        ({"previous_response_id": name}, "previous_response_id"),
    ):
        response = await client.post(PATH, json={**HI, **fields})
        assert_error(response, 400, "invalid_value", param)
    assert engine.requests == []
    assert_error(await client.get(f"{PATH}/{name}"), 404, "not_found", None)
    answer = await create(client)
    missing = await client.get(f"{CONVERSATIONS}/{answer['id']}")
    assert_error(missing, 404, "not_found", None)
    for items, param in (
        ([{"type": "message", "role": "wizard", "content": ""}], "items[0].role"),
        ([HELLO] * 21, "items"),
        ([{**HELLO, "content": "x" * 3000}], "items"),
    ):
        response = await client.post(f"{path}/items", json={"items": items})
        assert_error(response, 400, "invalid_value", param)
    assert await texts(client, path) == []
    assert_error(await client.get(f"{path}/items/x"), 404, "not_found", None)
    response = await make_client(max_stored_responses=0).post(CONVERSATIONS, json={})
    assert response.status_code == 400


async def test_each_key_has_its_own_conversations(make_client: MakeClient) -> None:
    client = make_client(api_key=("one", "two"))
    keys = [{"Authorization": f"Bearer {key}"} for key in ("one", "two")]
    made = (await client.post(CONVERSATIONS, json={}, headers=keys[0])).json()
    body = {**HI, "conversation": made["id"]}
    assert (await client.post(PATH, json=body, headers=keys[0])).status_code == 200
    refused = await client.post(PATH, json=body, headers=keys[1])
    assert_error(refused, 400, "invalid_value", "conversation")


async def test_the_sdk(served: str, engine: FakeEngineClient) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served}/v1", api_key="secret", max_retries=0) as sdk:
        made = await sdk.conversations.create(items=[HELLO])  # type: ignore[list-item]
        await sdk.responses.create(**HI, conversation=made.id)
        items = [item async for item in sdk.conversations.items.list(made.id, limit=1)]
        assert len(items) == 3
        one = await sdk.conversations.items.retrieve(items[0].id, conversation_id=made.id)  # type: ignore[arg-type, union-attr]
        assert one == items[0]
        assert (await sdk.conversations.delete(made.id)).deleted
