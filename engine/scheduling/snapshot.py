"""A snapshot of the scheduler and its blocks, for a live view of the engine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice

from ..cache.block_manager import BlockManager
from ..live import LiveSequence, LiveSnapshot
from ..outputs import EngineStats
from ..sequence import Sequence, SequenceStatus
from .step_planner import Draft

MAX_WAITING = 64
"""Sequences of a snapshot that do not run. The queue may hold thousands."""


def take_snapshot(
    block_manager: BlockManager,
    stats: EngineStats,
    running: list[Sequence],
    unfinished: Iterable[Sequence],
    last: Draft | None,
    tokens_computed: int,
) -> LiveSnapshot:
    """Describe all blocks, the running sequences, and the first MAX_WAITING of the others.

    `last` is the plan of the last step. The lists of copied and evicted blocks begin with the
    snapshot before, so the first one has none.
    """
    step_tokens: dict[int, int] = {}
    if last is not None:
        step_tokens = {
            sequence.seq_id: count for sequence, count in zip(last.rows, last.counts, strict=True)
        }
    others = (one for one in unfinished if one.status is not SequenceStatus.RUNNING)
    trace = block_manager.pool.restart_trace()
    return LiveSnapshot(
        time.monotonic(),
        stats,
        tokens_computed,
        block_manager.block_size,
        block_manager.pool.states(),
        sorted(trace.copied),
        sorted(trace.evicted),
        [
            _describe(sequence, step_tokens.get(sequence.seq_id, 0))
            for sequence in (*running, *islice(others, MAX_WAITING))
        ],
    )


def _describe(sequence: Sequence, step_tokens: int) -> LiveSequence:
    return LiveSequence(
        sequence.seq_id,
        sequence.request.request_id[:8],
        sequence.choice,
        "running" if sequence.status is SequenceStatus.RUNNING else "waiting",
        len(sequence.token_ids),
        sequence.num_prompt_tokens,
        sequence.num_computed_tokens + sequence.num_in_flight,
        sequence.num_cached_tokens,
        step_tokens,
        sequence.num_preemptions,
        list(sequence.block_table),
    )
