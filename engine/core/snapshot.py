"""A snapshot of the scheduler and its blocks, for a live view of the engine."""

from __future__ import annotations

import time
from itertools import islice

from ..outputs import LiveSequence, LiveSnapshot
from ..scheduling.scheduler import Scheduler
from ..sequence import Sequence, SequenceStatus

MAX_WAITING = 64
"""Sequences of a snapshot that do not run. The queue may hold thousands."""


def take_snapshot(scheduler: Scheduler) -> LiveSnapshot:
    """Describe all blocks, the running sequences, and the first MAX_WAITING of the others.

    The lists of copied and evicted blocks begin with the snapshot before: the first one has none.
    """
    block_manager, last = scheduler.block_manager, scheduler.last_plan
    step_tokens: dict[int, int] = {}
    if last is not None:
        step_tokens = {
            sequence.seq_id: count for sequence, count in zip(last.rows, last.counts, strict=True)
        }
    others = (
        one for one in scheduler.requests.unfinished() if one.status is not SequenceStatus.RUNNING
    )
    trace = block_manager.pool.restart_trace()
    return LiveSnapshot(
        time.monotonic(),
        scheduler.stats(),
        scheduler.tokens_computed,
        block_manager.block_size,
        block_manager.pool.states(),
        sorted(trace.copied),
        sorted(trace.evicted),
        [
            _describe(
                sequence, step_tokens.get(sequence.seq_id, 0), block_manager.held_blocks(sequence)
            )
            for sequence in (*scheduler.running, *islice(others, MAX_WAITING))
        ],
        block_manager.has_groups,
    )


def _describe(sequence: Sequence, step_tokens: int, blocks: list[int]) -> LiveSequence:
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
        blocks,
    )
