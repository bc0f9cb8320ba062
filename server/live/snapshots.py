"""GET /debug/live: what the engine's blocks and sequences do, as server-sent events.

An event with the engine's state comes at most five times a second while this is read, and costs
the engine nothing otherwise. It has no token and no text of any request.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from ...engine.errors import InvalidRequestError
from ...engine.outputs import LiveSequence, LiveSnapshot
from ..errors import error_body
from ..http.auth import require_debug_key
from ..http.route_docs import errors, event_stream
from ..http.sse import EventStream, Pace, event
from ..requests.state import ServerState, state_of

public = APIRouter(tags=["operations"])


@public.get(
    "/debug/live",
    response_model=None,
    dependencies=[Depends(require_debug_key)],
    responses={**event_stream(), **errors(400, 401)},
)
async def live(
    request: Request,
    limit: Annotated[int | None, Query(ge=1)] = None,
    engine: str | None = None,
) -> EventStream:
    """Stream snapshots of the engine: all blocks, and the sequences with their block tables. Of
    several engines (`--data-parallel-size`) `engine` names one; by default it is the first that
    serves.

    The stream goes on until the client leaves, or ends after `limit` events.
    """
    state = state_of(request)
    return EventStream(
        _events(state, limit, _named(state, engine)),
        on_failure=lambda error: [event(error_body(error, request.state.request_id))],
        on_close=lambda: None,
        request_id=request.state.request_id,
        deadline=None,
        pace=Pace.of(state.settings),
        headers={},
    )


def _named(state: ServerState, engine: str | None) -> str | None:
    """Return the name of the engine to show; None if engines have no names. Raises
    InvalidRequestError if there is none of this name."""
    engines = state.engine.engines()
    if engine is None:
        serving = [name for name, one in engines.items() if one.health.ready]
        return next(iter([*serving, *engines]), None)
    if engine not in engines:
        known = f"choose from {', '.join(engines)}" if engines else "the only one has no name"
        raise InvalidRequestError(f"there is no engine {engine[:128]!r}: {known}", "engine")
    return engine


def _facts(state: ServerState, engine: str | None) -> dict[str, Any]:
    """Return the fields that every event has: the engine's health, its name, and those of all."""
    engines = state.engine.engines()
    if engine is None:
        return {"health": state.engine.health().reason}
    one = engines.get(engine)
    reason = "it has left" if one is None else one.health.reason
    return {"health": reason, "engine": engine, "engines": list(engines)}


async def _events(
    state: ServerState, limit: int | None, engine: str | None
) -> AsyncGenerator[bytes, None]:
    """Yield an event for each snapshot of an engine, and for each second without one."""
    describe = Describer()
    count = 0
    async with aclosing(state.engine.snapshots(engine)) as snapshots:
        async for snapshot in snapshots:
            if state.draining:  # a page that is left open must not hold up the server's end
                return
            fields = _facts(state, engine)
            if snapshot is not None:
                info = state.engine.info
                fields |= describe(snapshot) | {
                    "max_num_seqs": info.max_num_seqs,
                    "max_model_len": info.max_model_len,
                    "max_num_batched_tokens": info.max_num_batched_tokens,
                }
            yield event(fields)
            count += 1
            if count == limit:
                return


class Describer:
    """Turns one reader's snapshots into the fields of its events.

    Block tables are long and mostly grow, so an event has only their new end: `table` begins at
    index `table_start`, and what stood before it is that of the event before.
    """

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}

    def __call__(self, snapshot: LiveSnapshot) -> dict[str, Any]:
        """Return the fields of a snapshot. `blocks` is compressed by zlib, then in base64."""
        sequences = [self._sequence(sequence) for sequence in snapshot.sequences]
        self._tables = {one.seq_id: one.block_table for one in snapshot.sequences}
        return {
            "time": snapshot.time,
            "stats": {**snapshot.stats.fields(), "kv_usage": snapshot.stats.kv_usage},
            "tokens_computed": snapshot.tokens_computed,
            "block_size": snapshot.block_size,
            "blocks": base64.b64encode(zlib.compress(snapshot.blocks, 1)).decode(),
            "copied": snapshot.copied,
            "evicted": snapshot.evicted,
            "has_groups": snapshot.has_groups,
            "sequences": sequences,
        }

    def _sequence(self, sequence: LiveSequence) -> dict[str, Any]:
        fields = sequence._asdict()
        table: list[int] = fields.pop("block_table")
        known = self._tables.get(sequence.seq_id, [])
        start = len(known) if known == table[: len(known)] else 0
        return {**fields, "table_start": start, "table": table[start:]}
