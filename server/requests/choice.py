"""A choice as it grows, and the deltas that it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ...engine.outputs import FinishReason, TokenLogprobs
from ...engine.reasoning import ReasoningTracker
from ..text.detokenizer import Detokenizer


class Delta(NamedTuple):
    """More of one choice. `token_ids` and `logprobs` are those of `text`; `offsets` are the places
    in the choice's whole text where the texts of the tokens begin, if log-probabilities are asked
    for."""

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    offsets: list[int]


@dataclass(slots=True)
class Choice:
    """A choice as it grows. `index` counts the choices of all prompts, `number` those of its own
    prompt."""

    index: int
    number: int
    detokenizer: Detokenizer
    num_tokens: int = 0
    logprob_sum: float = 0.0
    finish_reason: FinishReason | None = None
    pending_ids: list[int] = field(default_factory=list)
    """Tokens that no delta has brought yet."""
    pending_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """The log-probabilities of `pending_ids`."""
    pending_offsets: list[int] = field(default_factory=list)
    """Where the texts of `pending_ids` begin, if that is asked for."""
    num_characters: int = 0
    """Characters of all deltas so far."""
    last_token_time: float | None = None
    reasoning: ReasoningTracker | None = None
    """Counts the tokens of the reasoning, if a chat's answer may have any."""

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of the tokens, by which best_of ranks."""
        return self.logprob_sum / max(1, self.num_tokens)

    def take_delta(self, text: str, stop_reason: int | str | None) -> Delta:
        """Return `text` with the pending tokens, which are pending no longer. Tokens whose text
        begins in what is still held back stay pending, since a stop string may cut it off."""
        self.num_characters += len(text)
        count, end = len(self.pending_ids), self.num_characters
        if self.finish_reason is None:
            while self.pending_offsets[count - 1 : count] > [end]:
                count -= 1
        delta = Delta(
            self.index,
            text,
            self.pending_ids[:count],
            self.pending_logprobs[:count],
            self.finish_reason,
            stop_reason,
            [min(offset, end) for offset in self.pending_offsets[:count]],
        )
        del self.pending_ids[:count], self.pending_logprobs[:count], self.pending_offsets[:count]
        return delta
