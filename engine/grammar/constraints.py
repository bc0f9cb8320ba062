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
    demanded = _demanded(alive)
    masks = structured.start(
        [one for one in alive if one.sequence.request.grammar is not None or one.row in demanded],
        demanded,
    )
    banned, after_drafts = {}, {}
    for row, sequence, drafts in alive:
        words = sequence.request.sampling_params.bad_words
        if not words or row in demanded:
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


def _demanded(rows: list[ReadingRow]) -> dict[int, tuple[int, ...]]:
    """Return the tokens of which each row must sample one, for the rows whose budget of reasoning
    demands it. Rows with drafts are too far from the end of their budget."""
    demanded = {}
    for row, sequence, _ in rows:
        tracker = sequence.reasoning
        if tracker is not None:
            new = sequence.token_ids[sequence.num_prompt_tokens + tracker.num_read :]
            for token_id in new:
                if len(new) > 1:  # what was demanded before each, if another engine sampled them
                    tracker.demanded()
                tracker.read((token_id,))
            token_ids = tracker.demanded()
            if token_ids is not None:
                demanded[row] = token_ids
    return demanded
