"""A router that follows its engines' messages.

Whoever owns the links to the engines calls it: `join` when an engine is ready, `observe` for each
of its messages, `choose` and then `sent` for each request, `leave` when it is gone.
"""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ..cache.block_hashes import prompt_hashes
from ..lora import adapter_key
from ..outputs import EngineStats
from ..process import wire
from ..request import Request
from .kv_index import KVIndex
from .router import Choice, EngineState, Router


class CacheSize(Protocol):
    """The size of an engine's cache; EngineInfo has it."""

    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def group_windows(self) -> tuple[int | None, ...]: ...


class _Sent(NamedTuple):
    """A request that an engine has not reported to have read."""

    uncached_tokens: int
    num_sequences: int
    num_blocks: int
    adapter: str | None


@dataclass(slots=True)
class _Load:
    """An engine's latest statistics, and what was sent to it that they do not include."""

    num_blocks: int
    num_groups: int
    """How many blocks of the engine a block of tokens takes."""
    stats: EngineStats | None = None
    num_read: int = 0
    """How many of the requests sent from here the engine has read."""
    sent: deque[_Sent] = field(default_factory=deque)

    def read(self, stats: EngineStats, num_added: int) -> None:
        self.stats = stats
        while self.num_read < num_added and self.sent:
            self.sent.popleft()
            self.num_read += 1

    def state(self, engine: str, adapter: str | None = None) -> EngineState:
        """`adapter` is that of the request for which an engine is chosen."""
        stats, sent = self.stats, self.sent
        waiting = sum(one.uncached_tokens for one in sent)
        sequences = sum(one.num_sequences for one in sent)
        free = self.num_blocks
        if stats is not None:
            waiting += stats.waiting_tokens
            sequences += stats.num_running + stats.num_waiting
            free = stats.num_free_blocks - stats.num_cached_blocks
        free = free // self.num_groups - sum(one.num_blocks for one in sent)
        lacks = adapter is not None and not (
            (stats is not None and adapter in stats.held_adapters)
            or any(one.adapter == adapter for one in sent)
        )
        return EngineState(engine, waiting, sequences, max(free, 0), lacks)


class FleetRouter:
    """Chooses engines for requests. All engines have the same block size.

    Of requests for a LoRA adapter, its name is the key of ties, so that its requests stay together;
    an engine that has it in no slot has to fill one for it.
    """

    def __init__(self, index: KVIndex | None = None) -> None:
        self._index = index or KVIndex()
        self._router: Router | None = None
        self.block_size = 0
        """Of all engines; 0 before the first has joined."""
        self._loads: dict[str, _Load] = {}
        self.predicted_tokens = 0
        """Cached tokens that were predicted of the requests that have been compared."""
        self.actual_tokens = 0
        """Cached tokens that the engines found for these."""
        self.wrong_tokens = 0
        """The sum of the differences between both, each without its sign."""

    def join(self, engine: str, info: CacheSize) -> wire.WatchBlocks:
        """Let an engine join that is ready, and return the message to send to it."""
        if not self._loads:
            self.block_size = info.block_size
            self._router = Router(self._index, info.block_size)
        assert info.block_size == self.block_size, "engines of a fleet have one block size"
        self._index.add_engine(engine)
        self._loads[engine] = _Load(info.num_blocks, len(info.group_windows))
        return wire.WatchBlocks()

    def leave(self, engine: str) -> None:
        """Forget an engine, with what was sent to it."""
        self._index.remove_engine(engine)
        del self._loads[engine]

    def observe(self, engine: str, message: wire.FromEngine) -> wire.WatchBlocks | None:
        """Read an engine's message, and return the message to answer it with, if there is one."""
        match message:
            case wire.StepMessage() | wire.Heartbeat():
                self._loads[engine].read(message.stats, message.num_added)
                blocks = message.blocks
                if blocks is not None and not self._index.apply(engine, blocks):
                    return wire.WatchBlocks()
            case wire.BlocksKnown(sequence, keys):
                self._index.reset(engine, sequence, keys)
        return None

    def hashes(self, request: Request, version: str = "") -> list[bytes]:
        """Return the hashes of the prompt's full blocks, as all engines compute them. `version` is
        that of the request's adapter; without it such a request has none."""
        key, name = None, request.adapter
        if name is not None:
            if not version:
                return []
            key = adapter_key(name, version)
        return prompt_hashes(request.prompt_token_ids, self.block_size, request.cache_salt, key)

    def choose(
        self,
        request: Request,
        hashes: abc.Sequence[bytes],
        now: float,
        engines: abc.Iterable[str] | None = None,
        tie_key: bytes | None = None,
    ) -> Choice:
        """Choose one of `engines`, by default of all, for a request with these hashes."""
        assert self._router is not None, "no engine has joined"
        names = self._loads if engines is None else engines
        adapter = request.adapter
        states = [self._loads[name].state(name, adapter) for name in names]
        if tie_key is None and adapter is not None:
            tie_key = adapter.encode()
        return self._router.choose(hashes, len(request.prompt_token_ids), states, now, tie_key)

    def sent(
        self, request: Request, hashes: abc.Sequence[bytes], choice: Choice, now: float
    ) -> None:
        """Note that the request was sent to the chosen engine, which its reports will include
        later."""
        self._index.expect(choice.engine, hashes, now)
        cached, length = choice.predicted_cached_tokens, len(request.prompt_token_ids)
        blocks = -(-length // self.block_size) - cached // self.block_size
        count = request.sampling_params.beam_width or request.sampling_params.n
        sent = _Sent(length - cached, count, blocks, request.adapter)
        self._loads[choice.engine].sent.append(sent)

    def compare(self, choice: Choice, num_cached_tokens: int) -> None:
        """Count how far a prediction was from what the engine has found."""
        self.predicted_tokens += choice.predicted_cached_tokens
        self.actual_tokens += num_cached_tokens
        self.wrong_tokens += abs(choice.predicted_cached_tokens - num_cached_tokens)
