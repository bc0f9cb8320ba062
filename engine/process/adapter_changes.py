"""Loading and unloading LoRA adapters on behalf of the engine's clients.

A change is answered once every client knows the adapters as they are after it. So whoever gets the
answer may ask any client for the adapter at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from ..errors import QuireError
from ..lora import AdapterSource
from . import wire

POLL_MS = 5
"""How often an idle engine looks whether an adapter has been read."""


class Loading(Protocol):
    """An adapter that is being read."""

    @property
    def read(self) -> Future[Any]: ...


class AdaptersProtocol(Protocol):
    """What changes adapters: `engine.core.adapters.LoadedAdapters`."""

    @property
    def sources(self) -> tuple[AdapterSource, ...]: ...

    def begin(self, source: AdapterSource, *, replace: bool) -> Loading: ...

    def finish(self, loading: Any) -> None: ...

    def unload(self, name: str) -> None: ...


class _Asked(NamedTuple):
    """Who asked for a change, and its number there."""

    client: bytes
    number: int


class AdapterChanges:
    """The changes that have been asked for and not been answered."""

    def __init__(self, send: Callable[[bytes, wire.FromEngine], None]) -> None:
        """`send` sends a message to a client."""
        self._send = send
        self._loading: list[tuple[_Asked, Loading]] = []
        self._unseen: dict[int, tuple[_Asked, set[bytes]]] = {}
        """By change, who asked for it and the clients that do not know of it yet."""
        self._changes = 0

    @property
    def is_reading(self) -> bool:
        """Whether an adapter is being read."""
        return bool(self._loading)

    def ask(
        self,
        adapters: AdaptersProtocol,
        client: bytes,
        message: wire.LoadAdapter | wire.UnloadAdapter,
        clients: list[bytes],
    ) -> None:
        """Begin a change for a client. `clients` are all that must know of it."""
        asked = _Asked(client, message.number)
        try:
            match message:
                case wire.LoadAdapter(_, source, replace):
                    loading = adapters.begin(source, replace=replace)
                    self._loading.append((asked, loading))
                case wire.UnloadAdapter(_, name):
                    adapters.unload(name)
                    self._tell(adapters, asked, clients)
        except QuireError as error:
            self._send(client, wire.AdapterRefused.for_error(message.number, error))

    def finish_read(self, adapters: AdaptersProtocol, clients: list[bytes]) -> None:
        """Make those adapters known that have been read since the last call."""
        done = [item for item in self._loading if item[1].read.done()]
        self._loading = [item for item in self._loading if item not in done]
        for asked, loading in done:
            try:
                adapters.finish(loading)
            except QuireError as error:
                self._send(asked.client, wire.AdapterRefused.for_error(asked.number, error))
            else:
                self._tell(adapters, asked, clients)

    def _tell(self, adapters: AdaptersProtocol, asked: _Asked, clients: list[bytes]) -> None:
        self._changes += 1
        self._unseen[self._changes] = asked, set(clients)
        for client in clients:
            self._send(client, wire.Adapters(self._changes, adapters.sources))

    def seen(self, client: bytes, change: int) -> None:
        """Note that a client knows of a change."""
        if change not in self._unseen:
            return
        asked, clients = self._unseen[change]
        clients.discard(client)
        if not clients:
            del self._unseen[change]
            self._send(asked.client, wire.AdapterChanged(asked.number))

    def forget(self, client: bytes) -> None:
        """Wait no longer for a client, which has died."""
        for change in list(self._unseen):
            self.seen(client, change)
