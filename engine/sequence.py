"""One mutable stream of tokens: its tokens, its blocks, and how far its K/V stands."""

from __future__ import annotations

import enum
from itertools import count

from .request import Request

_seq_ids = count()


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
    - There are no phases: a sequence is caught up when one token is left to compute; then its
      step samples the next one.

    Only scheduler and block manager write it; the worker reads.
    """

    __slots__ = (
        "arrival_order",
        "block_hashes",
        "block_table",
        "choice",
        "commit_at",
        "first_token_time",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "pending_forks",
        "prompt_logprobs",
        "request",
        "scheduled_time",
        "seed",
        "seq_id",
        "status",
        "stop_at",
        "token_ids",
    )

    def __init__(self, request: Request, choice: int, seed: int, arrival_order: int) -> None:
        """`seed` is this sequence's own (request seed + choice); `choice` counts the n choices."""
        params = request.sampling_params
        self.request = request
        self.choice = choice
        self.seed = seed
        self.seq_id = next(_seq_ids)
        self.arrival_order = arrival_order
        self.status = SequenceStatus.WAITING
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.stop_at = self.num_prompt_tokens + params.max_tokens
        """Length at which the sequence ends with finish_reason "length"."""
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the prefix index at first admission; None before it."""
        self.num_preemptions = 0
        self.pending_forks = params.n - 1 if choice == 0 else 0
        """Siblings still to be forked off, once all but the prompt's last token is computed."""
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.commit_at = 1
        """num_computed_tokens from which on the block manager has something to index."""
        self.prompt_logprobs: list[object] = []
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.request.request_id}/{self.choice}, "
            f"{self.num_computed_tokens}/{len(self.token_ids)} tokens, {self.status.name})"
        )
