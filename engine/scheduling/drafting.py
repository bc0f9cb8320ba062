"""Drafts in a step: room for them in its plan, and what became of them in its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cache.block_manager import BlockManager
from ..outputs import SequenceOutput, TokenLogprobs
from ..sequence import Sequence
from ..speculation.speculator import Speculator
from ..step import ModelRunnerOutput, SchedulerOutput
from .roster import Roster
from .sequence_outputs import token_output
from .step_planner import Plan

_PATIENCE = 8
"""Steps without a draft after which steps no longer wait for the tokens that a draft would follow,
except each so-many-th."""


class Drafting:
    """Adds drafts to plans, and takes from results the tokens that drafts made available."""

    def __init__(
        self,
        speculator: Speculator,
        block_manager: BlockManager,
        roster: Roster,
        clock: Callable[[], float],
    ) -> None:
        self.speculator = speculator
        self._block_manager = block_manager
        self._roster = roster
        self._clock = clock
        self._begin = 0.0
        """When the last step was planned, or its drafts had been proposed, by the clock."""
        self._idle = 0
        """Steps since the last one with drafts."""
        self._predicted: dict[int, tuple[int, int]] = {}
        """seq_id → accepted and rejected tokens of drafts that came from a prediction."""

    def add(self, plan: Plan, budget: int) -> dict[int, list[int]]:
        """Lengthen rows of a plan by drafts under what is left of the token budget. Returns them
        by row.

        A step that computes prompts, too, has none: everybody waits for those.
        """
        self._begin = self._clock()
        self._idle += 1
        num_rows = len(plan.rows)
        if plan.partial_rows or len(plan.token_ids) != num_rows:
            return {}
        candidates = [
            (row, sequence) for row, sequence in enumerate(plan.rows) if _may_draft(sequence)
        ]
        if not candidates:
            return {}
        drafts: dict[int, list[int]] = {}
        for row, token_ids, *_ in self.speculator.choose(candidates, num_rows, num_rows + budget):
            if self._allocate(plan, plan.rows[row], 1 + len(token_ids)):
                drafts[row] = token_ids
        if drafts:
            self._idle = 0
            firsts, plan.token_ids[:] = list(plan.token_ids), []
            for row, first in enumerate(firsts):
                plan.token_ids.append(first)
                if row in drafts:
                    plan.token_ids.extend(drafts[row])
                    plan.counts[row] += len(drafts[row])
        return drafts

    def waits_for_results(self, num_running: int) -> bool:
        """Whether the next step should know the tokens of the last one, to draft what follows: if
        drafts may pay, and there have been some lately, or it is time to look again."""
        lately = self._idle < _PATIENCE or self._idle % _PATIENCE == 0
        return lately and self.speculator.may_pay(num_running)

    def take_proposals(
        self, output: SchedulerOutput, proposed: dict[int, list[int]]
    ) -> SchedulerOutput:
        """Return what is left of a plan for whose rows the worker has proposed these drafts."""
        now = self._clock()
        passes = max(map(len, proposed.values()))
        self.speculator.cost.observe_passes(passes, len(proposed), now - self._begin)
        self._begin = now
        return output.with_proposals(proposed)

    def _allocate(self, plan: Plan, sequence: Sequence, num_tokens: int) -> bool:
        """Get slots for a row and its draft. A draft never takes a block that a row may need: as
        many as there are rows stay free."""
        manager, start = self._block_manager, len(sequence.block_table)
        missing = -(-(sequence.num_computed_tokens + num_tokens) // manager.block_size) - start
        if missing <= 0:
            return True
        if (missing + len(self._roster.running)) * manager.num_groups > manager.pool.num_free:
            return False
        # The row has the slot of its first token already, so that no copy is due.
        copies = manager.allocate_slots(sequence, num_tokens)
        assert copies == [], "a draft needed a copy"
        if self._roster.knows(sequence):
            plan.table_changes.extend(manager.changes_from(sequence, start))
        return True

    def take(
        self,
        sequence: Sequence,
        start: int,
        row: int,
        draft: list[int],
        result: ModelRunnerOutput,
        now: float,
    ) -> SequenceOutput:
        """Append what a row with a draft sampled, as far as the draft was right; `start` is the
        position of its first token. Returns the output, which may end the sequence.

        Row j's logits are those of the output without drafts if the drafts before it are what was
        sampled there. So tokens are taken up to the first that differs from its draft, which is
        itself the right one. If what follows a right draft is not valid, the draft's last token is
        left to the next step, which fails as it would have failed without drafts.
        """
        # 1. The longest run of right drafts, and the token after it.
        first = result.token_ids[row]
        assert first is not None  # a row that failed was dealt with
        tokens = [first]
        for token_id, after in zip(draft, result.after_drafts[row], strict=True):
            if tokens[-1] != token_id or after is None:
                break
            tokens.append(after)
        self._learn(sequence, draft, tokens)
        # 2. The end of the sequence may lie within it.
        end = start + 1
        for index, token_id in enumerate(tokens):
            if token_id in sequence.stop_ids or end + index + 1 >= sequence.stop_at:
                del tokens[index + 1 :]
                break
        # 3. K/V of the first token and of the right drafts counts; the slots of the others are
        #    written again by the next step.
        sequence.token_ids.extend(tokens)
        sequence.num_computed_tokens = start + len(tokens)
        if sequence.num_computed_tokens >= sequence.commit_at:
            self._block_manager.commit_full_blocks(sequence)
        # 4. The output.
        entries: list[TokenLogprobs] = []
        if row in result.logprobs:
            entries = [result.logprobs[row], *result.logprobs_after_drafts.get(row, [])]
        last = entries[len(tokens) - 1] if entries else None
        output = token_output(sequence, end + len(tokens), last, now)
        if len(tokens) > 1:
            output = output._replace(
                token_ids=tokens, logprobs=entries[: len(tokens)] if entries else None
            )
        return output

    def observe(self, output: SchedulerOutput, now: float) -> None:
        """Learn how long a step took that has ended now, if every row decoded, some with drafts."""
        drafted = sum(map(len, output.drafts.values()))
        if output.total_tokens == len(output.seq_ids) + drafted:
            self.speculator.cost.observe(output.total_tokens, now - self._begin)

    def predicted(self, sequence: Sequence) -> tuple[int, int] | None:
        """Return how many tokens of the request's prediction were accepted as drafts, and how many
        were not; None if it has none."""
        if not sequence.request.prediction:
            return None
        return self._predicted.get(sequence.seq_id, (0, 0))

    def counts(self) -> dict[str, Any]:
        """Return the counters of drafts, by the names of their fields in EngineStats."""
        counts = self.speculator.counts
        return {
            "num_drafts": counts.num_drafts,
            "draft_tokens": counts.draft_tokens,
            "accepted_tokens": counts.accepted_tokens,
            "accepted_per_position": tuple(counts.accepted_per_position),
        }

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has ended."""
        self.speculator.forget(sequence.seq_id)
        self._predicted.pop(sequence.seq_id, None)

    def _learn(self, sequence: Sequence, draft: list[int], tokens: list[int]) -> None:
        source, accepted = self.speculator.verified(sequence, len(draft), tokens), len(tokens) - 1
        if source == "prediction":
            right, wrong = self._predicted.get(sequence.seq_id, (0, 0))
            counts = (right + accepted, wrong + len(draft) - accepted)
            self._predicted[sequence.seq_id] = counts


def _may_draft(sequence: Sequence) -> bool:
    """Whether a sequence that decodes may have drafts: it has begun its answer by itself."""
    return not (
        sequence.is_beam
        or sequence.pooling
        or sequence.held_forks
        or sequence.num_in_flight
        or sequence.first_token_time is None
    )
