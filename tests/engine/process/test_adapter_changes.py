"""Test when a change of adapters is answered, with a fake of what loads them."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest

from quire.engine.errors import InvalidRequestError, ModelNotFoundError
from quire.engine.lora import AdapterSource
from quire.engine.process import wire
from quire.engine.process.adapter_changes import AdapterChanges

A, B = AdapterSource("a", "/a"), AdapterSource("b", "/b")
ONE, TWO = b"one", b"two"


@dataclass
class Loading:
    source: AdapterSource
    read: Future[None] = field(default_factory=Future)


class FakeAdapters:
    def __init__(self) -> None:
        self.loaded: dict[str, AdapterSource] = {}
        self.loading: list[Loading] = []

    @property
    def sources(self) -> tuple[AdapterSource, ...]:
        return tuple(self.loaded.values())

    def begin(self, source: AdapterSource, *, replace: bool) -> Loading:
        if source.name in self.loaded and not replace:
            raise InvalidRequestError("loaded", "lora_name")
        self.loading.append(Loading(source))
        return self.loading[-1]

    def finish(self, loading: Loading) -> None:
        loading.read.result()
        self.loaded[loading.source.name] = loading.source

    def unload(self, name: str) -> None:
        if self.loaded.pop(name, None) is None:
            raise ModelNotFoundError("unknown", "model")


class Engine:
    """The changes of one engine with two clients, and the messages that it sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Any]] = []
        self.changes = AdapterChanges(lambda client, message: self.sent.append((client, message)))
        self.adapters = FakeAdapters()

    def ask(self, message: Any, client: bytes = ONE) -> None:
        self.changes.ask(self.adapters, client, message, [ONE, TWO])

    def take(self) -> list[tuple[bytes, Any]]:
        sent, self.sent = self.sent, []
        return sent


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_a_load_is_answered_when_all_clients_know(engine: Engine) -> None:
    engine.ask(wire.LoadAdapter(7, A, False))
    engine.changes.finish_read(engine.adapters, [ONE, TWO])
    assert engine.take() == [] and engine.changes.is_reading
    engine.adapters.loading[0].read.set_result(None)
    engine.changes.finish_read(engine.adapters, [ONE, TWO])
    assert engine.take() == [(ONE, wire.Adapters(1, (A,))), (TWO, wire.Adapters(1, (A,)))]
    assert not engine.changes.is_reading
    engine.changes.seen(ONE, 1)
    engine.changes.seen(ONE, 1)
    assert engine.take() == []
    engine.changes.seen(TWO, 1)
    engine.changes.seen(TWO, 1)
    assert engine.take() == [(ONE, wire.AdapterChanged(7))]


def test_a_client_that_died_is_not_waited_for(engine: Engine) -> None:
    engine.adapters.loaded = {"a": A, "b": B}
    engine.ask(wire.UnloadAdapter(1, "a"))
    engine.ask(wire.UnloadAdapter(2, "b"), TWO)
    engine.take()
    engine.changes.seen(ONE, 1)
    engine.changes.seen(ONE, 2)
    engine.changes.forget(TWO)
    assert engine.take() == [(ONE, wire.AdapterChanged(1)), (TWO, wire.AdapterChanged(2))]


def test_what_is_refused_is_answered_at_once(engine: Engine) -> None:
    engine.ask(wire.UnloadAdapter(3, "a"))
    assert engine.take() == [(ONE, wire.AdapterRefused(3, "model_not_found", "unknown", "model"))]
    engine.ask(wire.LoadAdapter(4, A, False))
    engine.adapters.loading[0].read.set_exception(InvalidRequestError("broken", "lora_path"))
    engine.changes.finish_read(engine.adapters, [ONE, TWO])
    refused = wire.AdapterRefused(4, "invalid_value", "broken", "lora_path")
    assert engine.take() == [(ONE, refused)] and engine.adapters.sources == ()
