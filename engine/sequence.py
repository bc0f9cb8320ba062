"""One mutable stream of tokens: its tokens, its blocks, and how far its K/V stands."""

from __future__ import annotations

import enum
from itertools import count
from typing import NamedTuple

from .outputs import TokenLogprobs
from .request import Request

UNKNOWN_TOKEN = -1
"""Stands at the end of `token_ids` for a token that is sampled by a step whose results are not
here yet; the device knows it."""

_seq_ids = count()


class Rank(NamedTuple):
    """Who goes first, and, read from the other end, who is preempted first.

    A preempted sequence keeps its arrival order, so it stands before everyone who came later:
    at the head of the queue.
    """

    priority: int
    arrival_order: int
    choice: int


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """A request with n = 4 has four of these, sharing their prompt's blocks.

    Invariants, which `BlockManager.check_integrity` proves for the block fields:

    - `token_ids` is the prompt followed by the output; `num_computed_tokens` of them have their
      K/V in the blocks of `block_table`, in order, and never more than `len(token_ids)`.
    - `block_hashes[i]` is the chained hash of the i-th full block of tokens; it outlives a
      preemption, since it depends on tokens alone.
    - `num_in_flight` tokens behind them are being computed by steps that were launched and whose
      results are not here yet; the token that they sample, if they do, is UNKNOWN_TOKEN.
    - There are no phases: a sequence is caught up when one token is left to compute; then its
      step samples the next one.

    Only the scheduler, its step loop and block manager write it; the worker reads.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "choice",
        "commit_at",
        "first_token_time",
        "fork_at",
        "held_forks",
        "is_beam",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_logprobs",
        "num_preemptions",
        "num_prompt_tokens",
        "pooling",
        "prompt_logprobs",
        "rank",
        "reads_tokens",
        "request",
        "scheduled_time",
        "seed",
        "seq_id",
        "status",
        "stop_at",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self, request: Request, choice: int, seed: int, rank: Rank, stop_ids: frozenset[int]
    ) -> None:
        """`seed` is this sequence's own (request seed + choice); `choice` counts the n choices;
        `stop_ids` are the tokens that end it (the request's, and end-of-sequence)."""
        params = request.sampling_params
        self.request = request
        self.choice = choice
        self.seed = seed
        self.seq_id = next(_seq_ids)
        self.rank = rank
        self.stop_ids = stop_ids
        self.status = SequenceStatus.WAITING
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.stop_at = self.num_prompt_tokens + params.max_tokens
        """Length at which the sequence ends with finish_reason "length"."""
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the prefix index at first admission; None before it."""
        self.num_preemptions = 0
        self.held_forks: list[Sequence] = []
        """Siblings to be forked off once `fork_at` tokens are computed."""
        self.fork_at = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.commit_at = 1
        """num_computed_tokens from which on the block manager has something to index."""
        self.num_logprobs = params.logprobs
        """Alternatives to be sampled with their log-probabilities; None for no log-probability.
        Beam search goes on with as many as its width, none of which may be a stop token."""
        if params.beam_width is not None:
            self.num_logprobs = max(params.logprobs or 0, params.beam_width + len(stop_ids))
        self.pooling = request.pooling
        self.reads_tokens = request.grammar is not None or bool(params.bad_words)
        """The next token cannot be sampled before the host knows the last."""
        self.is_beam = params.beam_width is not None
        """The next token cannot even be computed before the host knows the last."""
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        """One entry a prompt position, as far as computed; the first has no predecessor."""
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def needs_whole_prompt(self) -> bool:
        """Log-probabilities of the prompt are asked for and not complete, or all of its hidden
        states are pooled: no prompt token may come from the cache."""
        if self.pooling is not None:
            return self.pooling != "last"
        return (
            self.request.sampling_params.prompt_logprobs is not None
            and len(self.prompt_logprobs) < self.num_prompt_tokens
        )

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.request.request_id}/{self.choice}, "
            f"{self.num_computed_tokens}/{len(self.token_ids)} tokens, {self.status.name})"
        )
