"""What the rows of a step may sample next, as far as it depends on the tokens before."""

from __future__ import annotations

from ..outputs import RowError
from ..sequence import Sequence, SequenceStatus
from ..step import NO_CONSTRAINTS, SamplingConstraints
from .bad_words import banned_tokens
from .masks import StructuredOutput, TokenMasks


class PendingConstraints:
    """Constraints whose bitmask a thread may still be filling."""

    def __init__(self, masks: TokenMasks | None, banned: dict[int, list[int]]) -> None:
        self._masks = masks
        self._banned = banned

    def wait(self) -> SamplingConstraints:
        """Return the constraints once they are complete."""
        if self._masks is None:
            return NO_CONSTRAINTS._replace(banned=self._banned) if self._banned else NO_CONSTRAINTS
        bitmask = memoryview(self._masks.wait().data).cast("B")
        return SamplingConstraints(list(self._masks.rows), bitmask, self._banned)

    @property
    def errors(self) -> dict[int, RowError]:
        """Rows whose grammar cannot be followed; complete after `wait`. Whatever such a row
        samples does not count."""
        return {} if self._masks is None else self._masks.errors


NOTHING_PENDING = PendingConstraints(None, {})


def start_constraints(
    structured: StructuredOutput, rows: list[tuple[int, Sequence]]
) -> PendingConstraints:
    """Begin to work out what `rows` may sample: rows of a plan, each with its sequence, whose
    tokens up to the one to sample are known."""
    # Sequences may have ended while their step was launched; nobody will look at their rows.
    alive = [(row, one) for row, one in rows if one.status is not SequenceStatus.FINISHED]
    demanded = _demanded(alive)
    masks = structured.start(
        [(row, one) for row, one in alive if one.request.grammar is not None or row in demanded],
        demanded,
    )
    banned = {}
    for row, one in alive:
        words = one.request.sampling_params.bad_words
        if (
            row not in demanded
            and words
            and (tokens := banned_tokens(words, one.token_ids, one.num_prompt_tokens))
        ):
            banned[row] = tokens
    return PendingConstraints(masks, banned) if masks or banned else NOTHING_PENDING


def _demanded(rows: list[tuple[int, Sequence]]) -> dict[int, tuple[int, ...]]:
    """Return the tokens of which each row must sample one, for the rows whose budget of reasoning
    demands it."""
    demanded = {}
    for row, sequence in rows:
        tracker = sequence.reasoning
        if tracker is not None:
            tracker.read(sequence.token_ids[sequence.num_prompt_tokens + tracker.num_read :])
            token_ids = tracker.demanded()
            if token_ids is not None:
                demanded[row] = token_ids
    return demanded
