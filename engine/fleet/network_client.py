"""The client of an engine on another machine, which somebody there supervises."""

from __future__ import annotations

import asyncio
import logging
from itertools import count

import zmq
from zmq.utils.monitor import recv_monitor_message

from ..network.keys import HEARTBEAT_TIMEOUT_MS, Endpoint, KeyPair, set_heartbeats
from ..process import wire
from ..process.engine_handle import EngineLink
from ..process.remote_client import EngineObserver, RemoteEngineClient, State
from ..process.streams import StreamTable

_ENDS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)

logger = logging.getLogger("quire.engine.client")


class NetworkLink(EngineLink):
    """A link to an engine of another machine.

    It never reconnects by itself, since messages may have been lost: its client makes a new one,
    with another name.
    """

    has_keys = True

    def __init__(self, endpoint: Endpoint, name: bytes, keys: KeyPair) -> None:
        self._keys, self._server_key = keys, endpoint.public_key
        super().__init__(endpoint.address, name)

    def _configure(self) -> None:
        socket = self._socket
        socket.set(zmq.CURVE_SERVERKEY, self._server_key.encode())
        socket.set(zmq.CURVE_PUBLICKEY, self._keys.public.encode())
        socket.set(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
        socket.set(zmq.RECONNECT_IVL, -1)
        socket.set(zmq.CONNECT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.set(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        set_heartbeats(socket)
        self._monitor = socket.get_monitor_socket(_ENDS)

    async def ended(self) -> None:
        """Wait until the link is lost, or could not be made."""
        await recv_monitor_message(self._monitor)

    def close(self) -> None:
        """Close the socket and drop what has not been sent."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        super().close()


class NetworkEngineClient(RemoteEngineClient):
    """A member of a fleet: the engine that `connect` is told of, for as long as the link lasts.

    `name` is unique among all clients that the engine ever has.
    """

    def __init__(
        self, name: str, keys: KeyPair, observer: EngineObserver | None, streams: StreamTable
    ) -> None:
        super().__init__(observer, streams)
        self._name, self._keys = name, keys
        self._numbers_of_links = count()
        self._follower: asyncio.Task[None] | None = None

    @property
    def is_linked(self) -> bool:
        """Whether there is a link, be it only about to be made."""
        return self._engine is not None

    async def start(self) -> None:
        """Do nothing: the supervisor starts the engine."""

    def connect(self, endpoint: Endpoint, restarts: int) -> None:
        """Connect to the engine. The client is ready when the engine itself has answered."""
        assert self._engine is None
        self._restarts = restarts
        name = f"{self._name}.{next(self._numbers_of_links)}".encode()
        link = NetworkLink(endpoint, name, self._keys)
        self._engine = link
        self._follower = asyncio.create_task(self._follow(link), name="engine link")

    async def close(self) -> None:
        """Close the link. Streams that the engine has go on elsewhere, or wait."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.wait([self._follower])
        self._state = State.CLOSED

    async def _follow(self, link: NetworkLink) -> None:
        reading = asyncio.create_task(self._read(link))
        ending = asyncio.create_task(link.ended())
        try:
            await asyncio.wait({reading, ending}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and (error := reading.exception()) is not None:
                logger.error("the link to engine %s failed", self._name, exc_info=error)
        finally:
            reading.cancel()
            ending.cancel()
            await asyncio.gather(reading, ending, return_exceptions=True)
            self._state = State.RESTARTING
            link.close()
            self._engine = None
            self._lose_engine()

    async def _read(self, link: NetworkLink) -> None:
        while True:
            message = await link.receive()
            if isinstance(message, wire.StartFailed):
                logger.error("engine %s refuses this server: %s", self._name, message.message)
            else:
                self._handle(message)
