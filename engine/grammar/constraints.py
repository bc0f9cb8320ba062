"""What the rows of a step may sample next, as far as it depends on the tokens before."""

from __future__ import annotations

from ..outputs import RowError
from ..sequence import ReadingRow, SequenceStatus
from ..step import NO_CONSTRAINTS, SamplingConstraints
from .bad_words import banned_tokens
from .masks import StructuredOutput, TokenMasks


class PendingConstraints:
    """Constraints whose bitmask a thread may still be filling."""

    def __init__(self, masks: TokenMasks | None, constraints: SamplingConstraints) -> None:
        """`constraints` are all but the bitmask and its rows, which `masks` brings."""
        self._masks = masks
        self._constraints = constraints

    def wait(self) -> SamplingConstraints:
        """Return the constraints once they are complete."""
        if self._masks is None:
            return self._constraints
        bitmask = memoryview(self._masks.wait().data).cast("B")
        return self._constraints._replace(mask_rows=self._masks.mask_rows, bitmask=bitmask)

    @property
    def errors(self) -> dict[int, RowError]:
        """Rows whose grammar cannot be followed; complete after `wait`. Whatever such a row
        samples does not count."""
        return {} if self._masks is None else self._masks.errors


NOTHING_PENDING = PendingConstraints(None, NO_CONSTRAINTS)


def start_constraints(structured: StructuredOutput, rows: list[ReadingRow]) -> PendingConstraints:
    """Begin to work out what `rows` may sample: rows of a plan, each with its sequence, whose
    tokens up to the one to sample are known."""
    # Sequences may have ended while their step was launched; nobody will look at their rows.
    alive = [one for one in rows if one.sequence.status is not SequenceStatus.FINISHED]
    masks = structured.start([one for one in alive if one.sequence.request.grammar is not None])
    banned, after_drafts = {}, {}
    for row, sequence, drafts in alive:
        words = sequence.request.sampling_params.bad_words
        if not words:
            continue
        tokens = [*sequence.token_ids, *drafts]
        known = len(sequence.token_ids)
        first, *others = [
            banned_tokens(words, tokens[: known + count], sequence.num_prompt_tokens)
            for count in range(len(drafts) + 1)
        ]
        if first:
            banned[row] = first
        if any(others):
            after_drafts[row] = others
    if not (masks or banned or after_drafts):
        return NOTHING_PENDING
    constraints = NO_CONSTRAINTS._replace(banned=banned, banned_after_drafts=after_drafts)
    return PendingConstraints(masks, constraints)
