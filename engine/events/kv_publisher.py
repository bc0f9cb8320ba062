"""Publishes block events over ZeroMQ as vLLM does, for routers outside of this server.

Each batch is a multipart message on a PUB socket: the topic, a sequence number from 0 (8 bytes,
big-endian) and msgpack of `[time, [event, …], data-parallel rank]`. An event is a map with its name
under "type", or a list that begins with it. A hash is published as the integer of its last 8 bytes.

Who has missed batches sends an empty frame and the first missing number to the ROUTER socket of
`replay_endpoint`, and is sent the batches from there on that are still kept, each as an empty
frame, number and payload; at the end number −1 with an empty payload.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from ..config import EngineConfig
from ..errors import StartupError
from .block_events import BlockEvent, BlocksCleared, BlocksRemoved, BlocksStored
from .kv_config import EventEncoding, KVEventsConfig, read_kv_events

MEDIUM = "GPU"
"""vLLM's name for the cache that a model attends to, on whatever device it is."""
END = (-1).to_bytes(8, "big", signed=True)
"""The sequence number that ends a replay."""
POLL_MS = 100
"""Interval at which the replay thread looks whether it must end."""

logger = logging.getLogger("quire.engine")


def make_publisher(config: EngineConfig) -> KVPublisher | None:
    """Return the publisher that the configuration asks for. Raises StartupError if its sockets
    cannot be opened."""
    wanted = read_kv_events(config.kv_events_config)
    return KVPublisher(wanted) if wanted.is_on else None


class KVPublisher:
    """A PUB socket, and a thread that answers requests for past batches. Publishing never waits:
    subscribers that do not keep up miss batches."""

    def __init__(self, config: KVEventsConfig) -> None:
        self._config = config
        self._topic = config.topic.encode()
        self._encoder = msgspec.msgpack.Encoder()
        self._sequence = 0
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._lock = threading.Lock()
        """Held while `_kept` is read or written."""
        self._closing = False
        self._replay: threading.Thread | None = None
        context: zmq.SyncContext = zmq.Context.instance()
        with contextlib.ExitStack() as opened:
            self._socket = opened.enter_context(context.socket(zmq.PUB))
            self._socket.setsockopt(zmq.SNDHWM, config.hwm)
            self._socket.setsockopt(zmq.LINGER, 0)
            _open(self._socket, config.own_endpoint)
            replay_endpoint = config.own_replay_endpoint
            if replay_endpoint is not None:
                router = opened.enter_context(context.socket(zmq.ROUTER))
                router.setsockopt(zmq.LINGER, 0)
                _open(router, replay_endpoint, bind=True)
                self._replay = threading.Thread(
                    target=self._answer_replays, args=(router,), daemon=True, name="kv-event replay"
                )
                self._replay.start()
            opened.pop_all()

    def begin(self) -> None:
        """Publish that no block is known: subscribers may remember those of an engine that died."""
        self.publish([BlocksCleared()])

    def publish(self, events: Sequence[BlockEvent]) -> None:
        """Publish a batch of events."""
        encoded = [_encode(event, self._config.encoding) for event in events]
        payload = self._encoder.encode([time.time(), encoded, self._config.rank])
        number = self._sequence.to_bytes(8, "big")
        self._sequence += 1
        with self._lock:
            self._kept.append((number, payload))
        self._socket.send_multipart((self._topic, number, payload))

    def close(self) -> None:
        """Close the sockets."""
        self._closing = True
        if self._replay is not None:
            self._replay.join()
        self._socket.close()

    def _answer_replays(self, router: zmq.SyncSocket) -> None:
        with router:
            while not self._closing:
                if router.poll(POLL_MS):
                    self._answer_replay(router)

    def _answer_replay(self, router: zmq.SyncSocket) -> None:
        frames = router.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            logger.warning("dropped a malformed request for past block events")
            return
        sender, _, first = frames
        with self._lock:
            kept = list(self._kept)
        for number, payload in kept:
            if number >= first:  # both are big-endian
                router.send_multipart((sender, b"", number, payload))
        router.send_multipart((sender, b"", END, b""))


def _open(socket: zmq.SyncSocket, endpoint: str, *, bind: bool = False) -> None:
    """Bind the socket, or connect it to an endpoint of another host. Raises StartupError."""
    bind = bind or "*" in endpoint or "::" in endpoint or endpoint.startswith("ipc://")
    try:
        if bind:
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        what = "bind" if bind else "connect to"
        raise StartupError(f"kv_events_config: cannot {what} {endpoint}: {error}") from error


def _encode(event: BlockEvent, encoding: EventEncoding) -> Any:
    """Return the event as vLLM has it, from plain values. Fields that are left out have defaults
    there."""
    match event:
        case BlocksStored():
            fields: dict[str, Any] = {
                "type": "BlockStored",
                "block_hashes": [_number(one) for one in event.hashes],
                "parent_block_hash": None if event.parent is None else _number(event.parent),
                "token_ids": event.token_ids,
                "block_size": event.block_size,
                "lora_id": None,
                "medium": MEDIUM,
                "lora_name": event.adapter,
            }
            if event.adapter is not None or event.salt is not None:
                fields["extra_keys"] = _extra_keys(event)
        case BlocksRemoved(hashes):
            numbers = [_number(one) for one in hashes]
            fields = {"type": "BlockRemoved", "block_hashes": numbers, "medium": MEDIUM}
        case BlocksCleared():
            fields = {"type": "AllBlocksCleared"}
    return fields if encoding == "map" else list(fields.values())


def _number(block_hash: bytes) -> int:
    return int.from_bytes(block_hash[-8:], "big")


def _extra_keys(event: BlocksStored) -> list[tuple[str, ...] | None]:
    """Return what else than its tokens decides each block's hash: the adapter's name, and in a
    prompt's first block the salt's digest."""
    common = () if event.adapter is None else (event.adapter,)
    keys: list[tuple[str, ...] | None] = [common or None for _ in event.hashes]
    if event.parent is None and event.salt is not None:
        keys[0] = (*common, event.salt)
    return keys
