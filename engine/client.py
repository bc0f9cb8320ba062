"""The engine's interface to the HTTP process: submit, abort, observe."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import NamedTuple, Protocol

from .config import EngineInfo
from .lora import AdapterSource
from .outputs import EngineStats, LiveSnapshot, SequenceOutput
from .request import Request


class EngineHealth(NamedTuple):
    """Whether the engine works.

    `alive` is False if work waits and no step finishes, or if the engine was given up. `ready` is
    False also while it loads, restarts or drains. `reason` is for a person. `restarts` counts the
    engine's restarts.
    """

    alive: bool
    ready: bool
    reason: str
    restarts: int


class EngineState(NamedTuple):
    """One of several engines behind a client: its health, and its latest statistics, if any."""

    health: EngineHealth
    stats: EngineStats | None


class Fingerprint(NamedTuple):
    """What two engines must have in common for one to go on with a stream of the other: then the
    continuation is the same, token for token, on the same kind of device.

    `weights` names the types of the weights as they are computed, quantisation included, and
    `adapter` is the version of the request's LoRA adapter.
    """

    model: str
    dtype: str
    kv_cache_dtype: str | None
    weights: str
    block_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    adapter: str | None = None

    @classmethod
    def of(cls, info: EngineInfo, adapter: str | None = None) -> Fingerprint:
        """Return that of an engine, for requests with the adapter of this name."""
        versions = {source.name: source.version for source in info.adapters}
        return cls(
            info.content,
            info.dtype,
            info.kv_cache_dtype,
            info.computed_format,
            info.block_size,
            info.vocab_size,
            info.eos_token_ids,
            None if adapter is None else versions.get(adapter, "not loaded"),
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Return what the other has different, for a person; None if nothing."""
        for name, ours, theirs in zip(self._fields, self, other, strict=True):
            if ours != theirs:
                return f"its {name} is {theirs!r} instead of {ours!r}"
        return None


class EngineClient(Protocol):
    """The engine as the HTTP process sees it."""

    @property
    def info(self) -> EngineInfo:
        """Facts about the loaded engine. Raises EngineNotReadyError until it has first started."""

    async def start(self) -> None:
        """Start the engine and return at once; `health().ready` becomes True when it serves."""

    def generate(self, request: Request) -> AsyncIterator[SequenceOutput]:
        """Submit the request and yield its outputs until all n sequences have a finish_reason.

        If the engine dies, the request goes on when it has started again, or on another engine, as
        if nothing had happened: each token comes once. If it cannot go on, its open sequences end
        with finish_reason "error" (code `engine_dead`); no exception is raised in mid-stream.
        Raises the error with which the engine refuses the request, or EngineNotReadyError if the
        engine is not serving when it is submitted. Closing the iterator early aborts the request.
        """

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End one sequence of a request, or all, with "abort". Unknown ids are ignored."""

    def stats(self) -> EngineStats | None:
        """Return the engine's latest statistics, or None before the first."""

    def snapshots(self, engine: str | None = None) -> AsyncGenerator[LiveSnapshot | None, None]:
        """Yield snapshots of the engine, at most five a second, until it is closed; of several, of
        that with this name.

        Yields None after each second without one: while a step takes longer, or the engine does not
        run. Raises EngineNotReadyError if there is no engine of this name.
        """

    def health(self) -> EngineHealth:
        """Return the engine's present health."""

    def engines(self) -> dict[str, EngineState]:
        """Return the state of each engine by its name; empty if there is only one, without a
        name."""

    def engine_of(self, request_id: str) -> str | None:
        """Return the name of the engine that has an open request, if engines have names."""

    async def reset_prefix_cache(self) -> None:
        """Forget every cached block that no sequence holds."""

    async def load_adapter(self, source: AdapterSource, *, replace: bool = False) -> None:
        """Load a LoRA adapter; with `replace`, in place of one of its name. Then every client of
        the engine knows it (`info.adapters`). Raises InvalidRequestError if it cannot be loaded,
        which has no effect on anything else."""

    async def unload_adapter(self, name: str) -> None:
        """Unload a LoRA adapter: requests that use it finish, and no new ones are accepted. Raises
        ModelNotFoundError if it is not loaded."""

    async def close(self) -> None:
        """Stop the engine. Open streams end with an error. Idempotent."""
