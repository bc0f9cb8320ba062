"""What passes between the scheduler and the worker in one step: plain data, torch-free.

    Scheduler.schedule() ──SchedulerOutput──▶ Launcher.forward ──▶ Forward.sample ──▶ results
                                                     ▲
                         SamplingConstraints ────────┘   (made while the forward runs)

Everything here is a NamedTuple of plain values. It holds no callable and no object that anyone
changes later, so msgspec encodes it as it is, and a worker in another process computes the same
step from it. The lists belong to the plan: whoever makes it builds them for it, and nobody changes
them afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

from .outputs import RowError, TokenLogprobs
from .request import Pooling
from .sampling_params import SamplingParams

UNKNOWN_TOKEN = -1
"""Stands for a token that an earlier step samples and whose value has not reached the host. The
worker, which sampled it, knows it."""


class BlockCopy(NamedTuple):
    """Copy K and V of every slot and layer from one block to another, before the forward."""

    source: int
    destination: int


class StateCopy(NamedTuple):
    """Copy the state of every layer from one state slot to another, before the forward. A step's
    copies are made one after the other: a source may have been the destination of an earlier
    one."""

    source: int
    destination: int


class StateSave(NamedTuple):
    """Keep a row's state as it is after the first `num_tokens` tokens of its sequence, in a state
    slot of its own. The forward does so on its way through the row."""

    row: int
    num_tokens: int
    slot: int


class BlockSave(NamedTuple):
    """Copy K and V of every slot and layer from a block to a slot of host memory, before the step
    changes any block."""

    block: int
    slot: int


class BlockLoad(NamedTuple):
    """Copy K and V of every slot and layer from a slot of host memory to a block, after the step's
    saves and before its other copies."""

    slot: int
    block: int


class SequenceSpec(NamedTuple):
    """What a worker must know of a sequence for as long as it runs.

    It is sent with the first row of a sequence that the worker does not know, which is true of a
    sequence that was preempted as well.
    """

    seq_id: int
    request_id: str
    choice: int
    """Index among the n choices of the request."""
    token_ids: list[int]
    """The prompt, and the output so far of a sequence that was preempted or forked."""
    num_prompt_tokens: int
    block_table: list[int]
    """The block ids that hold its K/V, in order; all that this step needs included."""
    sampling_params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    """Tokens that end the sequence."""
    num_logprobs: int | None
    """Alternatives to return with each sampled token's log-probability; None for no
    log-probabilities."""
    num_prompt_logprobs: int | None
    """Alternatives to return with each prompt token's log-probability; None for no
    log-probabilities."""
    has_grammar: bool
    pooling: Pooling | None
    """How the prompt's hidden states become an embedding; None for sequences that generate."""
    adapter_slot: int = -1
    """The slot of its LoRA adapter's weights; −1 without an adapter."""
    state_slot: int = -1
    """The slot of its state, in layers that keep one; −1 if the model has no such layers."""
    other_tables: list[list[int]] = []
    """The block tables of the other groups of layers, if there are several. The block behind the
    last one of the pool stands for those that no token needs any more."""


class AdapterLoad(NamedTuple):
    """Put an adapter's weights into a slot, in place of what is there, before the forward."""

    slot: int
    adapter_id: int


class TableChange(NamedTuple):
    """The columns from `start` on of a known sequence's block table are now `block_ids`, in one
    group of layers."""

    seq_id: int
    start: int
    block_ids: list[int]
    group: int = 0


class SchedulerOutput(NamedTuple):
    """The plan of one step. `seq_ids`, `num_computed_starts` and `num_new_tokens` are parallel,
    with one entry for each row.

    Row i computes the tokens [start, start + n) of its sequence. It samples the token after them,
    unless it is listed in `partial_rows` or its sequence is pooled.
    """

    step: int
    seq_ids: list[int]
    num_computed_starts: list[int]
    num_new_tokens: list[int]
    token_ids: list[int]
    """The ids of all rows' tokens, one row after the other. Only the token of a row with a single
    one may be UNKNOWN_TOKEN."""
    partial_rows: list[int]
    """Rows that leave later tokens of their sequence uncomputed, ascending."""
    new_sequences: list[SequenceSpec]
    """The sequences among `seq_ids` that the worker does not know."""
    block_copies: list[BlockCopy]
    table_changes: list[TableChange]
    """Changes to the block tables of sequences that the worker knows."""
    released: list[int]
    """seq_ids that the worker forgets before anything else in this step, since their sequences
    have finished or were aborted or preempted."""
    drafts: dict[int, list[int]]
    """By row, the guessed tokens of a row whose other token is its sequence's last one. They are
    the last of the row's tokens, and the row samples after each of its tokens. A draft of
    UNKNOWN_TOKENs is still to be proposed by the worker (see `with_proposals`)."""
    adapter_loads: list[AdapterLoad] = []
    """Slots that get other weights in this step, in order."""
    state_copies: list[StateCopy] = []
    state_saves: list[StateSave] = []
    block_saves: list[BlockSave] = []
    block_loads: list[BlockLoad] = []

    @property
    def total_tokens(self) -> int:
        """Number of tokens that the step computes."""
        return len(self.token_ids)

    @property
    def begins_with_copies(self) -> bool:
        """Whether anything is copied before the forward, which a step without rows may order."""
        blocks = self.block_copies or self.block_saves or self.block_loads
        return bool(blocks or self.adapter_loads or self.state_copies)

    @property
    def rows_to_propose(self) -> dict[int, int]:
        """How many tokens the worker has to propose, by row, before the step can begin."""
        drafts = self.drafts
        return {row: len(draft) for row, draft in drafts.items() if draft[0] == UNKNOWN_TOKEN}

    def with_proposals(self, proposed: dict[int, list[int]]) -> SchedulerOutput:
        """Return what is left of the plan once the worker has proposed these drafts, by row, and
        has carried out all that comes before a forward."""
        token_ids, end = list(self.token_ids), 0
        for row, count in enumerate(self.num_new_tokens):
            end += count
            if row in proposed:
                token_ids[end - len(proposed[row]) : end] = proposed[row]
        return self._replace(
            token_ids=token_ids,
            drafts=self.drafts | proposed,
            new_sequences=[],
            block_copies=[],
            table_changes=[],
            released=[],
            adapter_loads=[],
            state_copies=[],
            block_saves=[],
            block_loads=[],
        )


class SamplingConstraints(NamedTuple):
    """What the rows of a step may sample, as far as that depends on tokens sampled before."""

    mask_rows: list[int]
    """Rows of the SchedulerOutput that have a token bitmask, ascending. A row with drafts stands
    here once for each token that it samples."""
    bitmask: memoryview
    """int32 `[len(mask_rows), words]` in the machine's byte order: bit i % 32 of word i // 32
    allows token i."""
    banned: dict[int, list[int]]
    """Tokens that a row must not sample, by row: those that would complete a bad word."""
    banned_after_drafts: dict[int, list[list[int]]]
    """The same for what a row samples after each of its drafts."""


NO_CONSTRAINTS = SamplingConstraints([], memoryview(b""), {}, {})


class ModelRunnerOutput(NamedTuple):
    """The results of one step, parallel to the rows of its SchedulerOutput.

    `token_ids[i]` is None if the row sampled nothing or failed. `logprobs` and `errors` are keyed
    by row. `prompt_logprobs[i]` holds the entries for the prompt tokens at positions start + 1 …
    start + n of the row's chunk (the position after each computed one), as far as these belong to
    the prompt. `embeddings[i]` is the pooled vector of a row that reached the end of its prompt, as
    little-endian float32. `after_drafts[i]` holds what a row with drafts sampled after each of
    them, and None if there was nothing valid to sample.
    """

    token_ids: list[int | None]
    logprobs: dict[int, TokenLogprobs]
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    errors: dict[int, RowError]
    embeddings: dict[int, bytes]
    after_drafts: dict[int, list[int | None]]
    logprobs_after_drafts: dict[int, list[TokenLogprobs]]
