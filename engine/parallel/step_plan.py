"""A step as followers get it: numbers, and nothing about requests.

Followers run the forward of the very batch that rank 0 runs, so they need its layout (HostStep) and
its tokens, the block tables as they change, and which collectives follow the forward. All numbers
of rows are one int32 buffer:

    rows · starts · lengths [· slots]  of each batch row; slots are those of LoRA adapters
    [state slots]                     of each batch row, if layers keep states
    [token · slot]                    of each snapshot of a state
    sampling_rows · sampled_positions [· num_drafts]    of each sample
    token_ids                         of each token
    group · row · start · length · block ids  of each change of a block table

A decode of 256 rows takes 6 KiB. The plan of a step depends on nothing that the step samples: it is
sent before rank 0 launches the step itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..devices.steps import HostStep, StateRows
from ..step import AdapterLoad, BlockCopy, BlockLoad, BlockSave, StateCopy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..devices.steps import StepInputs
    from ..step import SchedulerOutput


class TableEntries(NamedTuple):
    """From column `start` on, a row of a group's block tables holds these ids."""

    group: int
    row: int
    start: int
    block_ids: list[int]


class StepPlan(NamedTuple):
    """One step. `width` is that of the block tables that the step reads, in blocks.

    A step without rows has `num_seqs` 0: it only changes tables and copies blocks.
    """

    step: int
    num_seqs: int
    num_tokens: int
    num_decodes: int
    max_query_len: int
    num_samples: int
    has_drafts: bool
    width: int
    packed: bytes
    copies: list[BlockCopy]
    saves: list[BlockSave] = []
    loads: list[BlockLoad] = []
    state_copies: list[StateCopy] = []
    num_state_saves: int = 0
    has_states: bool = False
    """Whether rows have states."""
    extra_logits: list[tuple[int, int]] = []
    """Ranges of the step's tokens whose logits are made after the forward, besides the samples'."""
    num_fed_back: int = 0
    """How many tokens of the step before come by a broadcast, for token ids below 0; 0 for none."""
    has_adapters: bool = False
    """Whether any row has a LoRA adapter."""
    adapter_loads: list[AdapterLoad] = []


def make_plan(
    output: SchedulerOutput,
    host: HostStep | None,
    token_ids: NDArray[np.int64],
    changes: list[TableEntries],
    *,
    extra_logits: list[tuple[int, int]],
    num_fed_back: int,
) -> StepPlan:
    """Pack a step. Token ids below 0 are those of `StepInputs.write`. `host` is None for a step
    without rows."""
    parts: list[Any] = []
    states = None if host is None else host.states
    if host is not None:
        parts += [host.rows, host.starts, host.lengths]
        if host.token_slots is not None:
            parts.append(host.token_slots[host.query_start_loc[:-1]])
        if states is not None:
            parts += [states.slots, states.saves.reshape(-1)]
        parts += [host.sampling_rows, host.sampled_positions, host.num_drafts, token_ids]
    for group, row, start, block_ids in changes:
        parts += [(group, row, start, len(block_ids)), block_ids]
    packed = np.concatenate([np.asarray(part, dtype=np.int32) for part in [*parts, ()]])
    return StepPlan(
        step=output.step,
        num_seqs=0 if host is None else len(host.order),
        num_tokens=len(token_ids),
        num_decodes=0 if host is None else host.num_decodes,
        max_query_len=0 if host is None else host.max_query_len,
        num_samples=0 if host is None else len(host.sampling_rows),
        has_drafts=host is not None and bool(host.num_drafts),
        width=0 if host is None else host.tables.shape[2],
        packed=packed.tobytes(),
        copies=output.block_copies,
        saves=output.block_saves,
        loads=output.block_loads,
        state_copies=output.state_copies,
        num_state_saves=0 if states is None else len(states.saves),
        has_states=states is not None,
        extra_logits=extra_logits,
        num_fed_back=num_fed_back,
        has_adapters=host is not None and host.token_slots is not None,
        adapter_loads=output.adapter_loads,
    )


class PlanReader:
    """Turns plans into a follower's HostSteps; keeps its copy of the block tables."""

    def __init__(
        self, num_groups: int, max_num_seqs: int, max_blocks: int, inputs: StepInputs
    ) -> None:
        self._table = np.zeros((num_groups, max_num_seqs, max_blocks), dtype=np.int32)
        self._inputs = inputs

    def read(self, plan: StepPlan) -> tuple[HostStep, NDArray[np.int64]] | None:
        """Bring the tables up to date, and return the step's layout and token ids as rank 0 had
        them, but without its sequences; None for a step without rows."""
        numbers = _Numbers(np.frombuffer(plan.packed, dtype=np.int32))
        size, samples = plan.num_seqs, plan.num_samples
        rows, starts, lengths = (numbers.take(size) for _ in range(3))
        slots = numbers.take(size) if plan.has_adapters else None
        states = None
        if plan.has_states:
            own, saves = numbers.take(size), numbers.take(2 * plan.num_state_saves)
            states = StateRows(own, saves.reshape(-1, 2))
        sampling_rows, sampled_positions = (numbers.take(samples) for _ in range(2))
        num_drafts = numbers.take(samples if plan.has_drafts else 0)
        token_ids = numbers.take(plan.num_tokens)
        while numbers.left:
            group, row, start, length = numbers.take(4).tolist()
            self._table[group, row, start : start + length] = numbers.take(length)
            self._inputs.change_table(group, row, start)
        if not size:
            return None
        loc = np.zeros(size + 1, dtype=np.int32)
        np.cumsum(lengths, out=loc[1:])
        host = HostStep(
            order=list(range(size)),
            sequences=[],
            starts=starts,
            lengths=lengths,
            num_decodes=plan.num_decodes,
            max_query_len=plan.max_query_len,
            sampling_rows=sampling_rows,
            sampled_positions=sampled_positions.tolist(),
            num_drafts=num_drafts.tolist(),
            pooled_rows=[],
            any_scored=False,
            query_start_loc=loc,
            seq_lens=(starts + lengths).astype(np.int32),
            rows=rows,
            tables=self._table[:, :, : plan.width],
            token_slots=None if slots is None else np.repeat(slots, lengths),
            states=states,
        )
        return host, token_ids


class _Numbers:
    """Takes numbers from the front of a buffer."""

    def __init__(self, packed: NDArray[np.int32]) -> None:
        self._packed = packed
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._packed) - self._at

    def take(self, count: int) -> NDArray[np.int64]:
        self._at += count
        return self._packed[self._at - count : self._at].astype(np.int64)
