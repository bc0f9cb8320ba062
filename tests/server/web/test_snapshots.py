"""Test the events of GET /debug/live: what they say, and when they end."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from quire.engine.client import EngineHealth, EngineState
from quire.engine.outputs import LiveSequence, LiveSnapshot, TierStats

from ..conftest import MakeClient
from ..fakes import FakeEngineClient
from ..openai_http import assert_error

SEQUENCE = LiveSequence(7, "a1b2c3d4", 0, "running", 40, 30, 39, 16, 1, 0, [4, 5, 9])


def snapshot(engine: FakeEngineClient, *tables: list[int]) -> LiveSnapshot:
    sequences = [
        SEQUENCE._replace(seq_id=number, block_table=table) for number, table in enumerate(tables)
    ]
    blocks = bytes([0, 1, 2, 3] * 16)
    return LiveSnapshot(1.5, engine.stats(), 99, 16, blocks, [2], [3], sequences)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    parts = response.text.removesuffix("data: [DONE]\n\n").split("\n\n")
    return [json.loads(part.removeprefix("data: ")) for part in parts if part]


async def test_an_event_describes_blocks_and_sequences(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    made = snapshot(engine, [4, 5, 9])
    tier = TierStats("host", 1, 5, 10, 2, 3, 4, 0)
    engine.live = [made._replace(stats=made.stats._replace(tiers=[tier]))]
    response = await client.get("/debug/live")
    assert response.headers["content-type"].startswith("text/event-stream")
    first, silent = events(response)
    assert zlib.decompress(base64.b64decode(first["blocks"])) == bytes([0, 1, 2, 3] * 16)
    assert (first["copied"], first["evicted"], first["tokens_computed"]) == ([2], [3], 99)
    assert first["stats"]["num_blocks"] == 64 and first["stats"]["kv_usage"] == 0
    assert first["stats"]["tiers"] == [tier._asdict()]
    assert first["max_model_len"] == engine.max_model_len
    (sequence,) = first["sequences"]
    assert sequence == {
        **{name: value for name, value in SEQUENCE._asdict().items() if name != "block_table"},
        "seq_id": 0,
        "table_start": 0,
        "table": [4, 5, 9],
    }
    assert silent == {"health": "ok"}
    assert response.text.endswith("data: [DONE]\n\n")


async def test_events_bring_only_the_new_end_of_a_table(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    steps = [
        [[1, 2], [3]],
        [[1, 2, 5], [3]],
        [[1, 6, 5], []],
        [[1, 6, 5, 7], [3, 4]],
    ]
    engine.live = [snapshot(engine, *tables) for tables in steps]
    seen: dict[int, list[int]] = {}
    sent = []
    for event, tables in zip(events(await client.get("/debug/live")), steps, strict=False):
        for one in event["sequences"]:
            known = seen.get(one["seq_id"], [])
            seen[one["seq_id"]] = known[: one["table_start"]] + one["table"]
            sent.append(len(one["table"]))
        assert list(seen.values()) == tables
    assert sent == [2, 1, 1, 0, 3, 0, 1, 2]


async def test_the_stream_ends_after_its_limit_and_when_the_server_stops(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.live = [snapshot(engine)] * 9
    assert len(events(await client.get("/debug/live?limit=3"))) == 3
    for limit in ("0", "x", "-1"):
        response = await client.get("/debug/live", params={"limit": limit})
        assert response.status_code == 400, response.text
    client.app.state.quire.begin_drain()  # type: ignore[attr-defined]
    assert events(await client.get("/debug/live")) == []


async def test_several_engines_are_named_and_one_is_shown(
    client: httpx.AsyncClient, engine: FakeEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = await client.get("/debug/live?engine=0")
    assert_error(response, 400, "invalid_value", "engine")
    stopped = EngineHealth(True, False, "restarting", 1)
    states = {"0": EngineState(stopped, None), "1": EngineState(engine.health(), None)}
    asked = []

    def snapshots(name: str | None = None) -> AsyncGenerator[LiveSnapshot | None, None]:
        asked.append(name)
        return FakeEngineClient.snapshots(engine, name)

    monkeypatch.setattr(engine, "engines", lambda: states)
    monkeypatch.setattr(engine, "snapshots", snapshots)
    engine.live = [snapshot(engine, [4])]
    for query, name in (("", "1"), ("?engine=0", "0"), ("?engine=1", "1")):
        first, silent = events(await client.get(f"/debug/live{query}"))
        assert silent == {
            "health": states[name].health.reason,
            "engine": name,
            "engines": ["0", "1"],
        }
        assert first.items() >= silent.items()
    assert asked == ["1", "0", "1"]
    response = await client.get("/debug/live?engine=2")
    assert_error(response, 400, "invalid_value", "engine")
    assert "choose from 0, 1" in response.json()["error"]["message"]


async def test_the_live_view_is_for_the_admin_if_there_are_keys(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    engine.live = [snapshot(engine, [1])]
    for keys in ({"api_key": ("one",)}, {"api_key": ("one",), "admin_api_key": "boss"}):
        client = make_client(**keys)
        for key in ("", "one", "wrong"):
            headers = {"authorization": f"Bearer {key}"}
            response = await client.get("/debug/live", headers=headers)
            assert_error(response, 401, "invalid_api_key", None)
    response = await client.get("/debug/live", headers={"authorization": "Bearer boss"})
    assert len(events(response)) == 2
