"""The items of a response's input, the tokens of an input, and compaction."""

from __future__ import annotations

from typing import Any

import httpx
import openai
from openai.types.responses import CompactedResponse, ResponseItemList

from quire.server.text.tokenizer import Tokenizer

from ..conftest import MODEL, MakeClient
from ..fakes import FakeEngineClient, prompt_text, say
from ..openai_http import assert_error
from .test_responses import CALL, HI, PATH, TOOL, create


async def test_input_items_are_listed_in_pages(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.max_model_len = 2048
    engine.scripts = say(f"Let me see.\n{CALL}")
    first = await create(client, tools=[TOOL])
    output = {"type": "function_call_output", "call_id": first["output"][1]["call_id"],
              "output": "rain"}  # fmt: skip
    second = await create(client, input=[output], previous_response_id=first["id"])
    url = f"{PATH}/{second['id']}/input_items"
    listed = (await client.get(url, params={"order": "asc"})).json()
    ResponseItemList.model_validate(listed)
    assert [item["type"] for item in listed["data"]] == [
        "message", "message", "function_call", "function_call_output"
    ]  # fmt: skip
    assert listed["data"][0]["content"] == [{"type": "input_text", "text": "hi"}]
    assert listed["has_more"] is False
    page = (await client.get(url, params={"limit": 3})).json()
    assert page["data"] == listed["data"][:0:-1] and page["has_more"] is True
    rest = (await client.get(url, params={"limit": 3, "after": page["last_id"]})).json()
    assert rest["data"] == listed["data"][:1] and rest["has_more"] is False
    assert_error(await client.get(url, params={"after": "x"}), 400, "invalid_value", "after")
    assert_error(await client.get(url, params={"limit": 0}), 400, "invalid_value", "limit")
    missing = await client.get(f"{PATH}/resp_none/input_items")
    assert_error(missing, 404, "not_found", None)
    again = await create(client, input=listed["data"], tools=[TOOL])
    assert again["status"] == "completed"


async def test_an_item_without_an_id_has_the_same_one_in_every_page(
    client: httpx.AsyncClient,
) -> None:
    nameless = {"type": "message", "role": "user", "id": None}
    items = [{**nameless, "content": text} for text in ("a", "b", "c")]
    answer = await create(client, input=[*items, {"role": "user", "content": "d"}])
    url = f"{PATH}/{answer['id']}/input_items"
    everything = (await client.get(url)).json()["data"]
    assert len({item["id"] for item in everything}) == 4
    found: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while len(found) < 4:
        page = (await client.get(url, params={"limit": 1, **after})).json()
        found += page["data"]
        after = {"after": page["last_id"]}
    assert found == everything and page["has_more"] is False


async def test_input_tokens_are_those_of_the_prompt(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    fields: dict[str, Any] = {**HI, "instructions": "Be brief", "tools": [TOOL]}
    counted = await client.post(f"{PATH}/input_tokens", json=fields)
    assert engine.requests == []
    first = await create(client, **fields)
    tokens = len(engine.requests[-1].prompt_token_ids)
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": tokens}
    follow = {**HI, "previous_response_id": first["id"], "truncation": "auto"}
    counted = await client.post(f"{PATH}/input_tokens", json=follow)
    assert counted.headers["x-quire-ignored-params"] == "truncation"
    await create(client, **follow)
    assert counted.json()["input_tokens"] == len(engine.requests[-1].prompt_token_ids)
    bad = await client.post(f"{PATH}/input_tokens", json={"model": MODEL})
    assert_error(bad, 400, "invalid_value", "input")


async def test_a_compaction_takes_the_place_of_a_conversation(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.max_model_len = 4096
    engine.scripts = say("A long answer.")
    first = await create(client)
    engine.scripts = say("They greeted each other.")
    asked = {"model": MODEL, "input": "and now?", "previous_response_id": first["id"]}
    answer = (await client.post(f"{PATH}/compact", json=asked)).json()
    # The package's type of an output has no messages of users, though they may be kept.
    CompactedResponse.model_validate({**answer, "output": answer["output"][-1:]})
    assert "A long answer." in prompt_text(engine, tokenizer)
    assert answer["usage"]["output_tokens"] > 0
    *kept, compaction = answer["output"]
    assert [item["content"][0]["text"] for item in kept] == ["hi", "and now?"]
    assert compaction["type"] == "compaction"
    await create(client, input=[*answer["output"], {"role": "user", "content": "Go on."}])
    text = prompt_text(engine, tokenizer)
    assert "Summary of the conversation so far:\nThey greeted each other." in text
    assert "A long answer." not in text
    response = await client.post(f"{PATH}/compact", json={**asked, "stream": True})
    assert response.headers["x-quire-ignored-params"] == "stream"
    assert response.json()["object"] == "response.compaction"


async def test_the_sdk(served: str, engine: FakeEngineClient) -> None:
    engine.max_model_len = 4096
    async with openai.AsyncOpenAI(base_url=f"{served}/v1", api_key="secret", max_retries=0) as sdk:
        answer = await sdk.responses.create(**HI)
        items = [item async for item in sdk.responses.input_items.list(answer.id, limit=1)]
        assert [item.type for item in items] == ["message"]
        assert (await sdk.responses.input_tokens.count(**HI)).input_tokens > 0
        compacted = await sdk.responses.compact(**HI)
        assert compacted.output[-1].type == "compaction"


async def test_each_key_lists_its_own_items(make_client: MakeClient) -> None:
    client = make_client(api_key=("one", "two"))
    keys = [{"Authorization": f"Bearer {key}"} for key in ("one", "two")]
    answer = (await client.post(PATH, json=HI, headers=keys[0])).json()
    url = f"{PATH}/{answer['id']}/input_items"
    assert (await client.get(url, headers=keys[0])).status_code == 200
    assert_error(await client.get(url, headers=keys[1]), 404, "not_found", None)


async def test_an_item_is_referred_to_by_its_id(
    make_client: MakeClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    client = make_client(api_key=("one", "two"))
    keys = [{"Authorization": f"Bearer {key}"} for key in ("one", "two")]
    answer = (await client.post(PATH, json=HI, headers=keys[0])).json()
    reference = {"type": "item_reference", "id": answer["output"][0]["id"]}
    body = {**HI, "input": [{"role": "user", "content": "hi"}, reference,
        {"role": "user", "content": "more"}]}  # fmt: skip
    response = await client.post(PATH, json=body, headers=keys[0])
    assert response.status_code == 200, response.text
    assert "assistant\nHello, world<|im_end|>\n<|im_start|>user\nmore" in prompt_text(
        engine, tokenizer
    )
    counted = await client.post(f"{PATH}/input_tokens", json=body, headers=keys[0])
    assert counted.json()["input_tokens"] == len(engine.requests[-1].prompt_token_ids)
    again = {**HI, "previous_response_id": response.json()["id"]}
    assert (await client.post(PATH, json=again, headers=keys[0])).status_code == 200
    refused = await client.post(PATH, json=body, headers=keys[1])
    assert_error(refused, 400, "invalid_value", "input[1].id")
