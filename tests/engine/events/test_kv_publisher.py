"""Test what is published, read as consumers of vLLM's events read it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import zmq

from quire.engine.config import EngineConfig
from quire.engine.errors import StartupError
from quire.engine.events.block_events import BlocksCleared, BlocksRemoved, BlocksStored
from quire.engine.events.kv_config import KVEventsConfig, kv_events_of_rank, read_kv_events
from quire.engine.events.kv_publisher import KVPublisher, make_publisher
from quire.engine.fleet.directory import LocalEngines
from quire.engine.process import wire

from ..fleet.local_engine import local_engine
from ..harness import make_request, prompt

HASHES = [bytes(range(i, i + 32)) for i in range(3)]


class KVCacheEvent(msgspec.Struct, tag=True):
    """The events as vLLM declares them."""


class BlockStored(KVCacheEvent):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(KVCacheEvent):
    pass


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Subscriber:
    """A SUB socket, and a DEALER socket that asks for replays. (REQ takes one answer only.)"""

    def __init__(self, endpoint: str, replay: str, topic: bytes) -> None:
        context: zmq.SyncContext = zmq.Context.instance()
        self._sub, self._dealer = context.socket(zmq.SUB), context.socket(zmq.DEALER)
        self._sub.setsockopt(zmq.SUBSCRIBE, topic)
        for socket, address in ((self._sub, endpoint), (self._dealer, replay)):
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(address)

    def receive(self) -> tuple[bytes, int, bytes]:
        assert self._sub.poll(5000), "nothing was published"
        topic, number, payload = self._sub.recv_multipart()
        return topic, int.from_bytes(number, "big"), payload

    def replay(self, first: int) -> list[tuple[int, bytes]]:
        self._dealer.send_multipart((b"", first.to_bytes(8, "big")))
        found = []
        while self._dealer.poll(5000):
            _, number, payload = self._dealer.recv_multipart()
            if not payload:
                assert number == b"\xff" * 8
                return found
            found.append((int.from_bytes(number, "big"), payload))
        raise AssertionError("the replay did not end")

    def close(self) -> None:
        self._sub.close()
        self._dealer.close()


@contextlib.contextmanager
def published(
    folder: Path, **fields: Any
) -> Iterator[tuple[KVPublisher, Subscriber, KVEventsConfig]]:
    config = KVEventsConfig(
        enable_kv_cache_events=True,
        endpoint=f"ipc://{folder}/pub",
        replay_endpoint=f"ipc://{folder}/replay",
        topic="kv@pod@model",
        **fields,
    )
    publisher = KVPublisher(config)
    subscriber = Subscriber(config.own_endpoint, str(config.own_replay_endpoint), b"kv@")
    while not subscriber._sub.poll(20):  # until it has subscribed, it misses what is sent
        publisher.begin()
    while subscriber._sub.poll(50):
        subscriber._sub.recv_multipart()
    try:
        yield publisher, subscriber, config
    finally:
        subscriber.close()
        publisher.close()


def test_events_read_as_vllm_declares_them(tmp_path: Path) -> None:
    chain = BlocksStored(HASHES[:2], None, list(range(32)), 16, "sql", "digest")
    tail = BlocksStored(HASHES[2:], HASHES[1], list(range(16)), 16, None, None)
    with published(tmp_path) as (publisher, subscriber, _):
        publisher.publish([BlocksRemoved(HASHES[:1]), chain, tail, BlocksCleared()])
        topic, number, payload = subscriber.receive()
        assert topic == b"kv@pod@model" and number > 0
        batch = msgspec.msgpack.decode(payload, type=Batch)
        ints = [int.from_bytes(one[24:], "big") for one in HASHES]
        assert batch.ts > 1.7e9 and batch.data_parallel_rank == 0
        assert batch.events == [
            BlockRemoved(ints[:1], "GPU"),
            BlockStored(
                *(ints[:2], None, list(range(32)), 16, None, "GPU", "sql"),
                [("sql", "digest"), ("sql",)],
            ),
            BlockStored(ints[2:], ints[1], list(range(16)), 16, None, "GPU", None),
            AllBlocksCleared(),
        ]
        publisher.publish([tail])
        assert subscriber.receive()[1] == number + 1


def test_events_as_lists_for_older_readers(tmp_path: Path) -> None:
    with published(tmp_path, encoding="array") as (publisher, subscriber, _):
        event = BlocksStored(HASHES[:1], None, [5] * 16, 16, None, None)
        publisher.publish([event, BlocksRemoved(HASHES[1:2]), BlocksCleared()])
        first, second = (int.from_bytes(one[24:], "big") for one in HASHES[:2])
        assert msgspec.msgpack.decode(subscriber.receive()[2])[1] == [
            ["BlockStored", [first], None, [5] * 16, 16, None, "GPU", None],
            ["BlockRemoved", [second], "GPU"],
            ["AllBlocksCleared"],
        ]


def test_missed_batches_are_replayed_as_far_as_they_are_kept(tmp_path: Path) -> None:
    with published(tmp_path, buffer_steps=5) as (publisher, subscriber, _):
        for _ in range(8):
            publisher.publish([BlocksCleared()])
        received = [subscriber.receive() for _ in range(8)]
        last = received[-1][1]
        assert subscriber.replay(last - 1) == [one[1:] for one in received[-2:]]
        assert [number for number, _ in subscriber.replay(0)] == list(range(last - 4, last + 1))
        assert subscriber.replay(last + 1) == []


def test_an_engine_publishes_what_it_caches(tmp_path: Path) -> None:
    with (
        published(tmp_path) as (publisher, subscriber, _),
        local_engine(tmp_path, publisher=publisher) as connect,
    ):
        assert msgspec.msgpack.decode(subscriber.receive()[2], type=Batch).events == [
            AllBlocksCleared()
        ]
        link = connect()
        link.send(wire.Add(make_request(prompt(40), 2)))
        (event,) = msgspec.msgpack.decode(subscriber.receive()[2], type=Batch).events
        assert isinstance(event, BlockStored)
        assert (event.token_ids, event.block_size) == (prompt(32), 16)


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_engines_side_by_side_publish_at_addresses_of_their_own(
    tmp_path: Path, scheme: str
) -> None:
    base = f"ipc://{tmp_path}/pub" if scheme == "ipc" else "tcp://*:5557"
    text = json.dumps({"endpoint": base, "replay_endpoint": base, "topic": "t"})
    first, third = (read_kv_events(kv_events_of_rank(text, rank)) for rank in (0, 2))
    assert (first.own_endpoint, first.own_replay_endpoint) == (base, base)
    expected = f"{base}_dp2" if scheme == "ipc" else "tcp://*:5559"
    assert (third.own_endpoint, third.own_replay_endpoint) == (expected, expected)
    assert third.topic == "t" and kv_events_of_rank(None, 1) is None


def test_the_engines_of_a_server_have_ranks() -> None:
    configs: list[EngineConfig] = []
    engines = LocalEngines(
        EngineConfig(model="none", device="cpu", num_threads=1, kv_events_config="{}"),
        2,
        lambda config, **options: configs.append(config),  # type: ignore[arg-type]
        lambda name: None,
    )
    engines.connect(mock.sentinel.streams)
    assert [read_kv_events(one.kv_events_config).rank for one in configs] == [0, 1]


def test_a_batch_says_which_engine_it_is_of(tmp_path: Path) -> None:
    with published(tmp_path, rank=3) as (publisher, subscriber, _):
        publisher.publish([BlocksCleared()])
        batch = msgspec.msgpack.decode(subscriber.receive()[2], type=Batch)
        assert batch.data_parallel_rank == 3


def test_an_address_that_cannot_be_bound_is_named(tmp_path: Path) -> None:
    text = f'{{"enable_kv_cache_events": true, "endpoint": "ipc://{tmp_path}/no/folder"}}'
    with pytest.raises(StartupError, match="kv_events_config: cannot bind ipc://.*/no/folder"):
        make_publisher(EngineConfig(model="none", kv_events_config=text))


@pytest.mark.parametrize("text", [None, "{}", '{"enable_kv_cache_events": false}'])
def test_nothing_is_published_unless_asked_for(text: str | None) -> None:
    assert make_publisher(EngineConfig(model="none", kv_events_config=text)) is None
