"""Responses that the server keeps: continued, deleted, made in the background and cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from openai.types.responses import Response

from quire.engine.outputs import RowError
from quire.server.http.responses_store import ResponseStore
from quire.server.settings import Settings
from quire.server.text.tokenizer import Tokenizer

from ..conftest import MakeClient
from ..fakes import FakeEngineClient, Script, ids, prompt_text, say
from ..openai_http import assert_error
from .dialect import assert_nothing_runs
from .test_responses import CALL, HI, PATH, TOOL, create


async def test_a_stored_response_can_be_continued(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.max_model_len = 2048
    engine.scripts = say(f"Let me see.\n{CALL}")
    first = await create(client, instructions="I", tools=[TOOL])
    assert (await client.get(f"{PATH}/{first['id']}")).json() == first
    engine.scripts = say("It rains.")
    call_id = first["output"][1]["call_id"]
    output = {"type": "function_call_output", "call_id": call_id, "output": "rain"}
    second = await create(client, input=[output], previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    text = prompt_text(engine, tokenizer)
    assert "system" not in text  # instructions hold for one response only
    assert '"weather"' in text and "<|im_start|>tool\nrain" in text
    third = await create(client, input="and now?", previous_response_id=second["id"])
    text = prompt_text(engine, tokenizer)
    for part in ("user\nhi", "Let me see.", "tool\nrain", "assistant\nIt rains.", "and now?"):
        assert text.count(part) == 1, part
    assert third["status"] == "completed"


async def test_responses_that_are_not_stored_are_not_found(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    client = make_client()
    answer = await create(client, store=False)
    assert answer["store"] is False
    assert_error(await client.get(f"{PATH}/{answer['id']}"), 404, "not_found", None)
    answer = await create(client)
    response = await client.delete(f"{PATH}/{answer['id']}")
    assert response.json() == {"id": answer["id"], "object": "response", "deleted": True}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
        response = await client.request(method, f"{PATH}/{answer['id']}{path}")
        assert_error(response, 404, "not_found", None)
    client = make_client(max_stored_responses=0)
    assert (await create(client))["store"] is False
    for name in ("store", "background"):
        response = await client.post(PATH, json={**HI, name: True})
        assert_error(response, 400, "invalid_value", name)


async def test_each_key_has_its_own_responses(make_client: MakeClient) -> None:
    client = make_client(api_key=("one", "two"), admin_api_key="boss")
    keys = [{"Authorization": "Bearer one"}, {"Authorization": "Bearer two"},
            {"Authorization": "Bearer boss"}]  # fmt: skip
    answer = (await client.post(PATH, json=HI, headers=keys[0])).json()
    url = f"{PATH}/{answer['id']}"
    follow = {**HI, "previous_response_id": answer["id"]}
    for headers in keys[1:]:
        assert_error(await client.get(url, headers=headers), 404, "not_found", None)
        assert_error(await client.delete(url, headers=headers), 404, "not_found", None)
        response = await client.post(PATH, json=follow, headers=headers)
        assert_error(response, 400, "invalid_value", "previous_response_id")
    assert (await client.get(url, headers={"x-api-key": "one"})).json() == answer


async def wait_for_status(
    client: httpx.AsyncClient, response_id: str, *statuses: str
) -> dict[str, Any]:
    """Poll a response until it has one of these statuses; return it."""
    async with asyncio.timeout(3):
        while True:
            response: dict[str, Any] = (await client.get(f"{PATH}/{response_id}")).json()
            if response["status"] in statuses:
                Response.model_validate(response)
                return response
            await asyncio.sleep(0.005)


async def test_a_background_response_is_queued_runs_and_completes(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.hold = asyncio.Event()
    queued = await create(client, background=True)
    assert (queued["status"], queued["background"]) == ("queued", True)
    running = await wait_for_status(client, queued["id"], "in_progress")
    assert running["output"] == []
    follow = {**HI, "previous_response_id": queued["id"]}
    assert_error(await client.post(PATH, json=follow), 400, "invalid_value", "previous_response_id")
    engine.hold.set()
    done = await wait_for_status(client, queued["id"], "completed")
    assert done["output"][0]["content"][0]["text"] == "Hello, world"
    assert (await client.post(f"{PATH}/{queued['id']}/cancel")).json() == done
    assert_nothing_runs(client, engine)


async def test_cancelling_a_background_response_aborts_it(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say("x" * 300, delay=0.01)
    first = await create(client, background=True)
    second = await create(client, background=True)
    await wait_for_status(client, first["id"], "in_progress")
    response = await client.post(f"{PATH}/{first['id']}/cancel")
    assert response.json()["status"] == "cancelled"
    Response.model_validate(response.json())
    assert (await client.get(f"{PATH}/{first['id']}")).json() == response.json()
    assert (await client.delete(f"{PATH}/{second['id']}")).status_code == 200
    assert_error(await client.get(f"{PATH}/{second['id']}"), 404, "not_found", None)
    assert not engine.running
    whole = await create(client, max_output_tokens=1)
    response = await client.post(f"{PATH}/{whole['id']}/cancel")
    assert_error(response, 400, "invalid_value", "response_id")
    assert_nothing_runs(client, engine)


async def test_failures_of_background_responses(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = lambda request, choice: Script(
        ids("ab"), finish="error", error=RowError("step_failed", "why")
    )
    answer = await create(client, background=True)
    failed = await wait_for_status(client, answer["id"], "failed")
    assert failed["error"]["message"] == "step_failed: why"
    engine.scripts = say("x", delay=5)
    answer = await create(client, background=True, timeout=0.05)
    failed = await wait_for_status(client, answer["id"], "failed")
    assert failed["error"]["message"].startswith("request_timeout")
    assert not engine.running
    engine.ready = False
    assert_error(await client.post(PATH, json={**HI, "background": True}), 503,
                 "engine_not_ready", None)  # fmt: skip


async def test_stopping_the_server_cancels_background_responses(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say("x" * 300, delay=0.01)
    answer = await create(client, background=True)
    await wait_for_status(client, answer["id"], "in_progress")
    await client.app.state.quire.responses.close()  # type: ignore[attr-defined]
    assert not engine.running
    assert (await client.get(f"{PATH}/{answer['id']}")).json()["status"] == "cancelled"


async def test_a_stored_response_is_not_streamed(client: httpx.AsyncClient) -> None:
    answer = await create(client)
    response = await client.get(f"{PATH}/{answer['id']}?stream=true")
    assert_error(response, 400, "invalid_value", "stream")


def test_the_store_is_bounded() -> None:
    now = 0.0
    settings = Settings(
        max_stored_responses=3, max_stored_response_bytes=1000, stored_response_ttl=10
    )
    store = ResponseStore(settings, clock=lambda: now)

    def add(name: str, size: int = 10) -> None:
        store.add((b"", name), {}, [], size + 13)

    def found() -> str:
        return "".join(name for name in "abcdefgh" if store.find((b"", name)))

    for name in "abcd":
        add(name)
    assert found() == "bcd"
    add("e", 900)
    assert found() == "cde"
    add("f", 500)
    assert found() == "f"
    add("g", 2000)  # too large by itself, so the others stay
    assert found() == "f"
    now = 9.0
    add("h")
    now = 10.5
    assert found() == "h"
    now = 20.0
    assert found() == ""
    assert (len(store), store.num_bytes) == (0, 0)


def test_one_keys_responses_drop_no_others() -> None:
    store = ResponseStore(Settings(max_stored_responses=4, max_stored_response_bytes=10_000))
    store.add((b"mine", "0"), {}, [], 4)
    for number in range(10):
        store.add((b"theirs", str(number)), {}, [], 4)
    kept = [number for number in range(10) if store.find((b"theirs", str(number)))]
    assert kept == [7, 8, 9] and store.find((b"mine", "0"))
    for number in range(10):
        store.add((b"theirs", f"large {number}"), {}, [], 4013)
    assert store.find((b"mine", "0")) and store.num_bytes <= 10_000
