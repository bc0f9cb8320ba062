"""One mutable stream of tokens: its tokens, its blocks, and how far its K/V has been computed."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from .outputs import TokenLogprobs
from .reasoning import ReasoningTracker
from .request import Pooling, Request
from .step import SequenceSpec

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
    """Whether a sequence waits for blocks, runs or has ended."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """A request with n = 4 has four of these, sharing their prompt's blocks.

    Invariants, which `BlockManager.check_integrity` proves for the block fields:

    - `token_ids` is the prompt followed by the output; `num_computed_tokens` of them have their
      K/V in the blocks of `block_table`, in order, and never more than `len(token_ids)`.
    - `block_hashes[i]` is the chained hash of the i-th full block of tokens; it outlives a
      preemption, since it depends on tokens only.
    - `num_in_flight` tokens after them are being computed by steps that were launched and whose
      results have not arrived; the token that they sample, if they do, is UNKNOWN_TOKEN.
    - There are no phases: a sequence is caught up when one token is left to compute; then its
      step samples the next one.

    Only the scheduling and cache rooms write to it. The worker never sees it, only its `spec`.
    """

    request: Request
    choice: int
    """Index among the n choices of the request."""
    seed: int
    """This sequence's own: the request's seed + choice, wrapped to 64 bits."""
    rank: Rank
    """Its place among the running and waiting sequences."""
    stop_ids: frozenset[int]
    """Tokens that end it: the request's, and end-of-sequence."""

    seq_id: int = field(init=False, default_factory=_seq_ids.__next__)
    """Unique in this process."""
    status: SequenceStatus = field(init=False, default=SequenceStatus.WAITING)
    token_ids: list[int] = field(init=False)
    """Prompt and output so far."""
    num_prompt_tokens: int = field(init=False)
    stop_at: int = field(init=False)
    """Length at which it ends with finish_reason "length"."""
    num_computed_tokens: int = field(init=False, default=0)
    """Tokens whose K/V is in its blocks."""
    num_in_flight: int = field(init=False, default=0)
    """Tokens after those that launched steps are computing."""
    num_cached_tokens: int | None = field(init=False, default=None)
    """Prompt tokens found in the prefix cache at its first admission; None before that."""
    num_preemptions: int = field(init=False, default=0)

    adapter_id: int | None = field(init=False, default=None)
    """The version of its LoRA adapter, if it has one."""
    adapter_key: str | None = field(init=False, default=None)
    """What tells its blocks from those of other adapters and versions: see `lora.adapter_key`."""
    adapter_slot: int = field(init=False, default=-1)
    """The device's slot of its adapter while it runs."""

    state_slot: int = field(init=False, default=-1)
    """The slot of its state while it runs, if the model's layers keep one."""
    state_mark: int = field(init=False, default=0)
    """Tokens after which its state is worth a snapshot, since other prompts begin alike; 0: none
    are known."""

    block_table: list[int] = field(init=False, default_factory=list)
    """Ids of its blocks, in the order of its tokens."""
    other_tables: list[list[int]] = field(init=False, default_factory=list)
    """Its block tables in the other groups of layers, if there are several."""
    block_hashes: list[bytes] = field(init=False, default_factory=list)
    """Chained hashes of its full blocks, as far as they were needed."""
    commit_at: int = field(init=False, default=1)
    """num_computed_tokens from which on the block manager has something to index."""
    held_forks: list[Sequence] = field(init=False, default_factory=list)
    """Siblings to be forked off once `fork_at` tokens are computed."""
    fork_at: int = field(init=False, default=0)

    num_logprobs: int | None = field(init=False)
    """Alternatives to sample with their log-probabilities; None for no log-probabilities. Beam
    search continues with as many as its width, none of which may be a stop token."""
    prompt_logprobs: list[TokenLogprobs | None] = field(init=False, default_factory=lambda: [None])
    """One entry for each prompt position computed so far; the first has no predecessor."""
    pooling: Pooling | None = field(init=False)
    """How its prompt becomes an embedding; None if it generates."""
    reasoning: ReasoningTracker | None = field(init=False, default=None)
    """Follows its reasoning if that has a budget. The grammar room lets it read the tokens."""
    reads_tokens: bool = field(init=False)
    """The host must know the last token before the next can be sampled (grammar, bad words, a
    budget of reasoning), at least at first."""
    is_beam: bool = field(init=False)
    """The host must know the last token before the next can even be computed."""

    scheduled_time: float | None = field(init=False, default=None)
    """`time.monotonic()` of its first admission."""
    first_token_time: float | None = field(init=False, default=None)
    """`time.monotonic()` at which its first token arrived."""

    def __post_init__(self) -> None:
        request, params = self.request, self.request.sampling_params
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        if request.resume:
            self.token_ids += request.resume[self.choice] or ()
        self.stop_at = self.num_prompt_tokens + params.max_tokens
        self.num_logprobs = params.logprobs
        self.is_beam = params.beam_width is not None
        if params.beam_width is not None:
            self.num_logprobs = max(params.logprobs or 0, params.beam_width + len(self.stop_ids))
        self.pooling = request.pooling
        if request.reasoning is not None:
            self.reasoning = ReasoningTracker(request.reasoning)
        self.reads_tokens = self._reads_all or self.reasoning is not None

    @property
    def num_expected_tokens(self) -> int:
        """Prompt tokens that must be computed, as far as whoever routed the request knows."""
        return max(self.num_prompt_tokens - self.request.expected_cached_tokens, 0)

    @property
    def num_output_tokens(self) -> int:
        """Sampled tokens, one in flight included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def _reads_all(self) -> bool:
        return self.request.grammar is not None or bool(self.request.sampling_params.bad_words)

    @property
    def reads_next_token(self) -> bool:
        """Whether the host must know the last token before the next can be sampled. Once reasoning
        has ended, its budget does not matter any more."""
        return self._reads_all or (self.reasoning is not None and not self.reasoning.is_over)

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether no prompt token may come from the cache: log-probabilities of the prompt are
        asked for and not complete, or all of its hidden states are pooled."""
        if self.pooling is not None:
            return self.pooling not in ("last", "classify")
        return (
            self.request.sampling_params.prompt_logprobs is not None
            and len(self.prompt_logprobs) < self.num_prompt_tokens
        )

    def spec(self) -> SequenceSpec:
        """What a worker that does not know the sequence must be told, as it stands now."""
        request, params = self.request, self.request.sampling_params
        return SequenceSpec(
            seq_id=self.seq_id,
            request_id=request.request_id,
            choice=self.choice,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            block_table=list(self.block_table),
            other_tables=[list(table) for table in self.other_tables],
            sampling_params=params,
            seed=self.seed,
            stop_ids=self.stop_ids,
            num_logprobs=self.num_logprobs,
            num_prompt_logprobs=params.prompt_logprobs if self.choice == 0 else None,
            has_grammar=request.grammar is not None,
            pooling=self.pooling,
            adapter_slot=self.adapter_slot,
            state_slot=self.state_slot,
        )

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.request.request_id}/{self.choice}, "
            f"{self.num_computed_tokens}/{len(self.token_ids)} tokens, {self.status.name})"
        )


class ReadingRow(NamedTuple):
    """A row of a plan whose sampling depends on the tokens sampled before, with its drafts."""

    row: int
    sequence: Sequence
    drafts: list[int]
