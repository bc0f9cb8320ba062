"""Helpers for the tests of every dialect: send requests, validate answers with the vendor's SDK."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import httpx
from pydantic import BaseModel, TypeAdapter

from ..fakes import FakeEngineClient


class Dialect:
    """A chat API: its path, a valid body, and the SDK's types for its answers and events."""

    def __init__(
        self,
        path: str,
        body: dict[str, Any],
        answer: type[BaseModel],
        events: TypeAdapter[Any],
        untyped: Collection[str] = (),
    ) -> None:
        """`untyped` are the types of events that the SDK handles itself, without validation."""
        self._path = path
        self._body = body
        self._answer = answer
        self._events = events
        self._untyped = untyped

    async def create(self, client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
        """Return a whole answer that the SDK's type accepts."""
        response = await client.post(self._path, json={**self._body, **fields})
        assert response.status_code == 200, response.text
        self._answer.model_validate(response.json())
        answer: dict[str, Any] = response.json()
        return answer

    async def stream(self, client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
        """Return the events of a streamed answer."""
        response = await client.post(self._path, json={**self._body, "stream": True, **fields})
        assert response.status_code == 200, response.text
        return self.events_of(response.text)

    def events_of(self, text: str) -> list[dict[str, Any]]:
        """Parse a stream; check each event's name, number and type."""
        events: list[dict[str, Any]] = []
        for block in text.strip().split("\n\n"):
            if block.startswith(":"):
                continue
            name, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            assert event.get("sequence_number", len(events)) == len(events)
            if event["type"] not in self._untyped:
                self._events.validate_python(event)
            events.append(event)
        return events


def assert_nothing_runs(client: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    """Assert that the engine is idle and no request counts towards the queue limits."""
    assert not engine.running
    in_flight = client.app.state.quire.in_flight  # type: ignore[attr-defined]
    assert in_flight.num_queued == in_flight.num_running == 0
