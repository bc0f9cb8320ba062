"""What all clients of an engine process share, whoever supervises that process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from itertools import count
from typing import NamedTuple, Protocol

from ..client import EngineHealth, EngineState
from ..config import EngineInfo
from ..errors import (
    EngineDeadError,
    EngineNotReadyError,
    InvalidRequestError,
    QuireError,
    error_from_code,
)
from ..lora import AdapterSource
from ..outputs import EngineStats, LiveSnapshot, SequenceOutput
from ..request import Request
from . import wire
from .engine_handle import EngineLink
from .live_feed import LiveFeed
from .stream import Place
from .streams import StreamTable


class EngineObserver(Protocol):
    """Callbacks about the engine's state, invoked on the event loop."""

    def engine_ready(self, info: EngineInfo) -> None: ...

    def engine_restarted(self) -> None: ...

    def observe_step(self, stats: EngineStats) -> None: ...


class State(enum.Enum):
    """State of the engine; the value is its description for a person."""

    STARTING = "the engine is starting"
    READY = "ready"
    STALLED = "no step finishes; the engine is being restarted"
    RESTARTING = "the engine is restarting"
    FAILED = "the engine has failed too often and was given up"
    CLOSED = "the engine is stopped"


class EngineStatus(NamedTuple):
    """What an engine's supervisor reports to its other clients.

    `address` is where the engine listens, or None while no engine is ready.
    """

    state: State
    restarts: int
    address: str | None


class RemoteEngineClient:
    """Base of the `EngineClient`s whose engine is in another process.

    Subclasses set `_engine` and `_state`, and pass the engine's messages to `_handle`. For use on
    one event loop.
    """

    def __init__(self, observer: EngineObserver | None, streams: StreamTable | None = None) -> None:
        """`streams` is given if several engines share a table, and somebody else submits."""
        self._observer = observer
        self._engine: EngineLink | None = None
        self._is_alone = streams is None
        self._streams = StreamTable(self._choose) if streams is None else streams
        self._seeds: random.Random | None = None
        self._idle = False
        """Whether the engine had no work when it was last heard of."""
        self.on_message: Callable[[wire.FromEngine], None] | None = None
        """Called with each message of the engine, before it is handled."""
        self.on_lost: Callable[[], None] | None = None
        """Called when the engine serves no longer, before its streams go on elsewhere."""
        self.on_failed: Callable[[], None] | None = None
        """Called when the engine is given up."""
        self.is_leaving = False
        """Whether the engine ends because it was told to: its end is nobody's fault."""
        self._state = State.STARTING
        self._restarts = 0
        self._info: EngineInfo | None = None
        self._stats: EngineStats | None = None
        self._resets: deque[asyncio.Future[None]] = deque()
        self._changes: dict[int, asyncio.Future[None]] = {}
        """The changes of adapters that are asked for and not answered, by number."""
        self._numbers = count()
        self._live = LiveFeed(self._ask_for_snapshots)

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineNotReadyError(self._state.value)
        return self._info

    async def generate(self, request: Request) -> AsyncGenerator[SequenceOutput, None]:
        self._require_ready()
        if self._seeds is None:
            self._seeds = self._make_seeds(self.info.seed)
        request = request.with_seed(self._seeds.getrandbits(63))
        async with contextlib.aclosing(self._streams.generate(request)) as outputs:
            async for output in outputs:
                yield output

    def _make_seeds(self, seed: int | None) -> random.Random:
        """Return what draws the seeds of requests that have none, from the configured `seed`. They
        are drawn here, so that another engine can go on with the request."""
        return random.Random(seed)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        self._streams.abort(request_id, choice)

    async def start(self) -> None:
        """Start the engine, if that is this client's task."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the client, and the engine if it was started by this client."""
        raise NotImplementedError

    def stats(self) -> EngineStats | None:
        return self._stats

    def health(self) -> EngineHealth:
        state = self._state
        alive = state not in (State.STALLED, State.FAILED, State.CLOSED)
        return EngineHealth(alive, state is State.READY, state.value, self._restarts)

    def engines(self) -> dict[str, EngineState]:
        return {}

    def engine_of(self, request_id: str) -> str | None:
        return None

    async def reset_prefix_cache(self) -> None:
        """Forget every cached block that no sequence holds.

        Raises EngineNotReadyError, or EngineDeadError if the engine dies before it answers.
        """
        self._require_ready()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._resets.append(done)
        self._send(wire.ResetPrefixCache())
        await done

    async def load_adapter(self, source: AdapterSource, *, replace: bool = False) -> None:
        """Load a LoRA adapter; with `replace`, in place of one of its name.

        Raises InvalidRequestError if it cannot be loaded, and what `reset_prefix_cache` raises.
        """
        await self._change(wire.LoadAdapter(next(self._numbers), source, replace))

    async def unload_adapter(self, name: str) -> None:
        """Unload a LoRA adapter; requests that use it finish.

        Raises ModelNotFoundError if it is not loaded, and what `reset_prefix_cache` raises.
        """
        await self._change(wire.UnloadAdapter(next(self._numbers), name))

    async def _change(self, message: wire.LoadAdapter | wire.UnloadAdapter) -> None:
        self._require_ready()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes[message.number] = done
        self._send(message)
        await done

    def snapshots(self, engine: str | None = None) -> AsyncGenerator[LiveSnapshot | None, None]:
        return self._live.snapshots()

    def _ask_for_snapshots(self, seconds: float) -> None:
        if self._state is State.READY:
            self._send(wire.Watch(seconds))

    @property
    def is_ready(self) -> bool:
        """Whether the engine serves."""
        return self._state is State.READY

    @property
    def has_failed(self) -> bool:
        """Whether the engine was given up."""
        return self._state is State.FAILED

    def send(self, message: wire.ToEngine) -> None:
        """Send a message to the engine, which must be connected."""
        self._send(message)

    def _handle(self, message: wire.FromEngine) -> None:
        if self.on_message is not None:
            self.on_message(message)
        match message:
            case wire.StepMessage(outputs, stats):
                self._idle = False
                self._streams.deliver(outputs)
                self._observe(stats)
            case wire.Heartbeat(stats):
                self._idle = True
                self._observe(stats)
            case wire.Begun(request_ids):
                self._streams.begun(request_ids)
            case wire.Rejected(request_id, code, text, param):
                error = error_from_code(code, text)
                if isinstance(error, InvalidRequestError):
                    error.param = param
                self._streams.reject(request_id, error)
            case wire.PrefixCacheReset():
                done = self._resets.popleft()
                if not done.done():
                    done.set_result(None)
            case wire.Adapters(change, adapters):
                assert self._info is not None
                self._info = dataclasses.replace(self._info, adapters=adapters)
                self._send(wire.AdaptersSeen(change))
            case wire.AdapterChanged(number):
                self._changed(number, None)
            case wire.AdapterRefused(number, code, text, param):
                error = error_from_code(code, text)
                if isinstance(error, InvalidRequestError):
                    error.param = param
                self._changed(number, error)
            case wire.LiveView(snapshot):
                self._live.deliver(snapshot)
            case wire.Ready(info):
                self._info = info
                self._state = State.READY
                if self._observer is not None:
                    self._observer.engine_ready(info)
                self._streams.resume()

    def _changed(self, number: int, error: QuireError | None) -> None:
        """Answer whoever asked for this change of adapters."""
        done = self._changes.pop(number)
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def _observe(self, stats: EngineStats) -> None:
        self._stats = stats
        if self._observer is not None:
            self._observer.observe_step(stats)

    # --- The engine as the table of streams sees it

    def add_request(self, request: Request) -> None:
        """Send a request to the engine."""
        self._send(wire.Add.sent(request, time.monotonic()))

    def abort_request(self, request_id: str, choice: int | None) -> None:
        """End one choice of a request there, or all of them."""
        if self._state is State.READY:
            self._send(wire.Abort(request_id, choice))

    def _choose(self, request: Request, began_at: EngineInfo | None) -> tuple[Place, Request]:
        self._require_ready()
        return self, request

    # ---

    def _send(self, message: wire.ToEngine) -> None:
        if self._engine is None:
            raise EngineNotReadyError(self._state.value)
        self._engine.send(message)

    def _require_ready(self) -> None:
        if self._state is not State.READY:
            raise EngineNotReadyError(self._state.value)

    def _fail_open(self, error: QuireError) -> None:
        """End everything that is open: no engine will come any more."""
        if self.on_lost is not None:
            self.on_lost()
        self._streams.fail_all(error, None if self._is_alone else self)
        self._fail_questions(error)
        if self.on_failed is not None:
            self.on_failed()

    def _lose_engine(self) -> None:
        """Let the streams of an engine that has died, or is about to be killed, go on with the next
        one, and fail what else was asked of it."""
        if self._state is State.STALLED and self._idle:
            self._streams.suspect_all(self)
        if self.on_lost is not None:
            self.on_lost()
        self._stats = None
        self._streams.detach(self, is_death=not self.is_leaving)
        self._fail_questions(EngineDeadError("the engine died before it answered"))

    def _fail_questions(self, error: QuireError) -> None:
        while self._resets:
            done = self._resets.popleft()
            if not done.done():
                done.set_exception(error)
        for number in list(self._changes):
            self._changed(number, error)
