"""What the engine reports to its clients: outputs of sequences, statistics, and, to those who watch
it, the state of every block and of every sequence, without any token or text.

They are NamedTuples, because a few hundred are made every step and msgspec sends them as arrays.
"""

from __future__ import annotations

from collections import abc
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position; `rank` 1 is the most likely token. `named_logprobs` are
    those of the request's `logprob_token_ids`, in their order, if it has some."""

    token_id: int
    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]
    named_logprobs: list[float] | None = None


class RowError(NamedTuple):
    """Why one row failed: `code` of an error in errors.py, and its message."""

    code: str
    message: str


class Timings(NamedTuple):
    """Seconds from the request's arrival to the stations of a sequence's life, as far as it got,
    and how often it was preempted."""

    scheduled: float | None
    first_token: float | None
    finished: float
    num_preemptions: int = 0


class SequenceOutput(NamedTuple):
    """What one step added to one sequence; the last has a `finish_reason`.

    `logprobs` is parallel to `token_ids` if asked for. `prompt_logprobs` comes once, with the
    first output of choice 0; its first entry (position 0) is None. `stop_reason` is the stop token
    id that ended the sequence, None for end-of-sequence. `error` is set with finish_reason "error".
    `embedding` is the only output of a request with pooling: little-endian float32. `predicted`
    comes with the last output of a request with a prediction: how many of its tokens were accepted
    as drafts, and how many were not.
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
    predicted: tuple[int, int] | None = None


def one_token(request_id: str, choice: int, token_id: int) -> SequenceOutput:
    """Make the output of almost every sequence and step: one token and nothing else.

    Building the tuple directly skips NamedTuple's handling of defaults, which takes longer than
    the rest of a row's update.
    """
    return tuple.__new__(SequenceOutput, (request_id, choice, [token_id], *_NOTHING_ELSE))


_NOTHING_ELSE = (None,) * (len(SequenceOutput._fields) - 3)


class TierStats(NamedTuple):
    """Where evicted blocks go: host memory, or the store below it. Counters run since the engine's
    start."""

    tier: str
    """"host", "disk" or "store"."""
    num_blocks: int
    """Blocks that it holds; for the store below, those that this process knows of."""
    max_blocks: int | None
    """Blocks that it has room for, if that is known."""
    block_bytes: int
    stored: int
    """Blocks that were copied to it."""
    loaded: int
    """Blocks that were copied from it."""
    dropped: int
    """Blocks that were given up for lack of room or because computing them anew is faster."""
    failures: int
    """Blocks that could not be stored, or not be loaded whole and intact."""


def summed_tiers(of_engines: abc.Iterable[list[TierStats]]) -> list[TierStats]:
    """Return the sums of the tiers of several engines, by name."""
    sums: dict[str, TierStats] = {}
    for tiers in of_engines:
        for one in tiers:
            other = sums.get(one.tier)
            if other is None:
                sums[one.tier] = one
                continue
            rooms = one.max_blocks, other.max_blocks
            sums[one.tier] = one._replace(
                num_blocks=one.num_blocks + other.num_blocks,
                max_blocks=None if None in rooms else sum(room or 0 for room in rooms),
                stored=one.stored + other.stored,
                loaded=one.loaded + other.loaded,
                dropped=one.dropped + other.dropped,
                failures=one.failures + other.failures,
            )
    return list(sums.values())


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
    """The prompt tokens that were found there."""
    preemptions: int
    blocks_copied: int
    blocks_shared: int
    running_adapters: list[str] = []
    """Names of the LoRA adapters of running sequences."""
    waiting_adapters: list[str] = []
    """Names of the adapters of waiting sequences."""
    num_drafts: int = 0
    """Drafts of speculative decoding that were verified."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()
    """Accepted tokens by their place in a draft."""
    waiting_tokens: int = 0
    """Prompt tokens of waiting sequences, without those that their requests are expected to find
    cached, and tokens that running sequences have still to compute."""
    tiers: list[TierStats] = []
    """Where evicted blocks go; empty if they go nowhere."""
    held_adapters: list[str] = []
    """Names of the adapters whose weights are in a slot of the device."""

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return 1.0 - self.num_free_blocks / self.num_blocks

    def fields(self) -> dict[str, object]:
        """Return the fields by name, those of the tiers included."""
        return {**self._asdict(), "tiers": [tier._asdict() for tier in self.tiers]}


class StepOutput(NamedTuple):
    """All that one step sends back, in one message."""

    outputs: list[SequenceOutput]
    stats: EngineStats


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
    """Ids of its blocks, in the order of its tokens; those of all groups of layers."""


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
    has_groups: bool = False
    """Whether groups of layers have blocks of their own: then a sequence's i-th block is not that
    of its i-th `block_size` tokens."""
