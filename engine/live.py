"""What a live view of the engine shows: the state of every block and of every sequence.

It holds no token and no text. They are NamedTuples, which msgspec sends as arrays.
"""

from __future__ import annotations

from typing import NamedTuple

from .outputs import EngineStats


class LiveSequence(NamedTuple):
    """One unfinished sequence, as it stands between two steps."""

    seq_id: int
    """Unique in the engine's process."""
    request: str
    """The first eight characters of the engine's own id of the request."""
    choice: int
    """Index among the n choices of the request."""
    status: str
    """"running", or "waiting": for its first step, for blocks after a preemption, or for the prompt
    that it will be forked from."""
    num_tokens: int
    """Length of prompt and output so far."""
    num_prompt_tokens: int
    num_computed_tokens: int
    """Tokens whose K and V are in its blocks, those that a launched step computes included."""
    num_cached_tokens: int | None
    """Prompt tokens found in the prefix cache at its first admission; None before that."""
    step_tokens: int
    """Tokens that the last step computed for it: 0 for none, 1 for a decode, more for a chunk."""
    num_preemptions: int
    block_table: list[int]
    """Ids of its blocks, in the order of its tokens."""


class LiveSnapshot(NamedTuple):
    """The engine between two steps. `blocks` has one byte for each block of the pool: 0 if it is
    free, 1 if it is free and its content can still be found, and n + 1 if n sequences hold it."""

    time: float
    """`time.monotonic()` of the engine."""
    stats: EngineStats
    tokens_computed: int
    """Tokens that all steps since the engine's start have computed."""
    block_size: int
    """Tokens per block."""
    blocks: bytes
    copied: list[int]
    """Blocks that were made by copying another one since the snapshot before, ascending."""
    evicted: list[int]
    """Cached blocks whose content was given up for new tokens since the snapshot before."""
    sequences: list[LiveSequence]
    """The running sequences by rank, then the first of the others by arrival."""
