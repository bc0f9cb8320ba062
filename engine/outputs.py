"""What passes between scheduler, worker and client: named, frozen, torch-free.

NamedTuples, because a few hundred are made every step and msgspec sends them as arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from .grammar.masks import TokenMasks
    from .sequence import Sequence

FinishReason = Literal["stop", "length", "abort", "error"]


class BlockCopy(NamedTuple):
    """Copy K and V of every slot and layer from one block to another, before the forward."""

    source: int
    destination: int


class TableChange(NamedTuple):
    """`sequence.block_table[start:]` differs from what the worker saw last."""

    sequence: Sequence
    start: int


class SchedulerOutput(NamedTuple):
    """One step's work. `sequences` and `num_new_tokens` are parallel.

    A row computes the sequence's tokens [start, start + n), start being `num_computed_starts[i]`;
    it samples where that reaches the sequence's last token. The worker reads sequences, it never
    writes them. A sequence that it has not seen, or that was in `released` since, is new to it:
    its whole table counts as changed and is not listed in `table_changes`.
    """

    step: int
    sequences: list[Sequence]
    num_computed_starts: list[int]
    num_new_tokens: list[int]
    total_tokens: int
    block_copies: list[BlockCopy]
    table_changes: list[TableChange]
    released: list[int]
    """seq_ids whose rows the worker may drop: finished, aborted or preempted since the last."""
    before_sampling: Callable[[], TokenMasks | None] = lambda: None
    """Called once the forward is under way, before any row is sampled: what constrained rows may
    sample. It brings in the last step's results where a row's sampling reads its tokens."""


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position; `rank` 1 is the most likely token."""

    token_id: int
    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]


class RowError(NamedTuple):
    """Why one row failed: `code` of an error in errors.py, and its message."""

    code: str
    message: str


class ModelRunnerOutput(NamedTuple):
    """The step's results, parallel to `SchedulerOutput.sequences`.

    `token_ids[i]` is None where the row did not reach its sequence's end or failed. `logprobs`
    and `errors` are keyed by row. `prompt_logprobs[i]` holds the entries for the prompt tokens at
    positions start+1 … start+n of the row's chunk (the position after each computed one), as far
    as they are prompt. `embeddings[i]` is the pooled vector of a row that reached its prompt's end,
    as little-endian float32.
    """

    token_ids: list[int | None]
    logprobs: dict[int, TokenLogprobs]
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    errors: dict[int, RowError]
    embeddings: dict[int, bytes]


class Timings(NamedTuple):
    """`time.monotonic()` seconds of a sequence's life, as far as it got."""

    arrival: float
    scheduled: float | None
    first_token: float | None
    finished: float


class SequenceOutput(NamedTuple):
    """What one step added to one sequence; the last has a `finish_reason`.

    `logprobs` is parallel to `token_ids` where asked for. `prompt_logprobs` comes once, with the
    first output of choice 0; its first entry (position 0) is None. `stop_reason` is the stop token
    id that ended it, None for end-of-sequence. `error` is set with finish_reason "error".
    `embedding` is the only output of a request with pooling: little-endian float32.
    """

    request_id: str
    choice: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: RowError | None = None
    num_cached_tokens: int | None = None
    timings: Timings | None = None
    embedding: bytes | None = None


def one_token(request_id: str, choice: int, token_id: int) -> SequenceOutput:
    """The output of almost every sequence and step: made without the defaults' detour, which
    takes longer than the rest of its update."""
    return tuple.__new__(SequenceOutput, (request_id, choice, [token_id], *_NOTHING_ELSE))


_NOTHING_ELSE = (None,) * (len(SequenceOutput._fields) - 3)


class EngineStats(NamedTuple):
    """A snapshot after a step. Counters run since the engine's start; the rest are gauges."""

    step: int
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    """Free blocks whose content may still be found by its hash."""
    step_tokens: int
    """Tokens computed by this step."""
    prefix_queries: int
    """Prompt tokens looked up in the prefix index."""
    prefix_hits: int
    """Of those, the tokens found."""
    preemptions: int
    blocks_copied: int
    blocks_shared: int

    @property
    def kv_usage(self) -> float:
        return 1.0 - self.num_free_blocks / self.num_blocks


class StepOutput(NamedTuple):
    """All that one step sends back, in one message."""

    outputs: list[SequenceOutput]
    stats: EngineStats
