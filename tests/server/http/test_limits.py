from __future__ import annotations

import asyncio

import httpx
import pytest

from quire.server.text.tokenizer import Tokenizer

from ..conftest import MODEL, MakeClient
from ..fakes import FakeEngineClient
from ..openai_http import COMPLETIONS, PROMPT, assert_error


async def _until(engine: FakeEngineClient, count: int) -> None:
    while len(engine.requests) < count:
        await asyncio.sleep(0.001)


async def test_the_queue_refuses_before_tokenising(
    make_client: MakeClient,
    engine: FakeEngineClient,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.hold = asyncio.Event()
    client = make_client(max_num_seqs=2, max_num_queued_reqs=3)
    waiting = [asyncio.create_task(client.post(COMPLETIONS, json=PROMPT)) for _ in range(5)]
    await asyncio.wait_for(_until(engine, 5), 5)

    async def unreachable(*_: object, **__: object) -> list[int]:
        raise AssertionError("tokenised a request that is refused")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", unreachable)
        response = await client.post(COMPLETIONS, json=PROMPT)
    assert_error(response, 429, "queue_full", None)
    assert int(response.headers["retry-after"]) >= 1
    assert len(engine.requests) == 5
    engine.hold.set()
    assert {response.status_code for response in await asyncio.gather(*waiting)} == {200}
    assert (await client.post(COMPLETIONS, json=PROMPT)).status_code == 200


async def test_waiting_tokens_are_limited_but_one_request_always_passes(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    engine.hold = asyncio.Event()
    client = make_client(max_num_queued_tokens=100)
    fields = {"model": MODEL, "prompt": [1] * 200}
    first = asyncio.create_task(client.post(COMPLETIONS, json=fields))
    await asyncio.wait_for(_until(engine, 1), 5)
    response = await client.post(COMPLETIONS, json=PROMPT)
    assert_error(response, 429, "queue_full", None)
    engine.hold.set()
    assert (await first).status_code == 200


async def test_a_disconnected_client_frees_its_place_in_the_queue(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    engine.hold = asyncio.Event()
    client = make_client()
    task = asyncio.create_task(client.post(COMPLETIONS, json={**PROMPT, "n": 3}))
    await asyncio.wait_for(_until(engine, 1), 5)
    assert (await _admission(client))["num_queued"] == 3
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await _admission(client) == {
        "num_queued": 0,
        "num_running": 0,
        "queued_tokens": 0,
        "draining": False,
    }
    assert not engine.running


async def _admission(client: httpx.AsyncClient) -> dict[str, int]:
    admission: dict[str, int] = (await client.get("/debug/engine")).json()["admission"]
    return admission
