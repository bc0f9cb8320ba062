"""Parameters that say how a request's tokens are drawn. Their bounds are checked here, once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .errors import InvalidRequestError

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this count as 0, since dividing logits by them would overflow."""
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROB_TOKEN_IDS = 128
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 256
MAX_LENGTH_PENALTY = 10
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
"""Bounds of repetition_penalty: logits divided or multiplied by it stay far from infinity."""
MAX_TOP_K = 2**31 - 1
"""Maximum top_k, far above any vocabulary."""


def _require(ok: bool, message: str, param: str) -> None:
    if not ok:
        raise InvalidRequestError(message, param)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of OpenAI's API and vLLM's extensions, with all defaults resolved.

    Stop *strings* are missing on purpose: the HTTP process applies them, where there is text.

    `n` is the number of sequences to fork (best_of, if that is larger). A request without a `seed`
    gets a random one. `bad_words` are token sequences: the last token of each is forbidden while
    the output ends with the tokens before it. `top_k` 0 means off. `logprobs` k returns the chosen
    token's log-probability and the k best ones, and None returns none; `logprob_token_ids` returns
    those of these tokens with them. `prompt_logprobs` does for the prompt what `logprobs` does for
    the output. Log-probabilities are the model's, before temperature, penalties and bias.

    `beam_width` w asks for beam search over w beams, which returns the n best. It draws nothing at
    random, so temperature must be 0 and nothing else may change the logits. A finished continuation
    of `length` tokens scores (sum of its log-probabilities) / length ** `length_penalty`. The
    search ends after w continuations have finished. With `early_stopping` True it ends at once,
    with False when no live beam would score better than the worst of the w best finished ones if it
    ended now, with "never" when none would even at its most favourable length. (These are the
    meanings that transformers gives it.)
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 0, "max_tokens must be at least 0", "max_tokens")
        _require(self.n >= 1, "n must be at least 1", "n")
        temperature = self.temperature
        _require(
            math.isfinite(temperature) and 0.0 <= temperature <= 2.0,
            "temperature must be from 0 to 2",
            "temperature",
        )
        _require(0.0 < self.top_p <= 1.0, "top_p must be above 0 and at most 1", "top_p")
        _require(
            0 <= self.top_k <= MAX_TOP_K, f"top_k must be from 0 (off) to {MAX_TOP_K}", "top_k"
        )
        _require(0.0 <= self.min_p <= 1.0, "min_p must be from 0 to 1", "min_p")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2.0 <= value <= 2.0, f"{name} must be from -2 to 2", name)
        _require(
            MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY,
            f"repetition_penalty must be from {MIN_REPETITION_PENALTY} to "
            f"{MAX_REPETITION_PENALTY:g}",
            "repetition_penalty",
        )
        self._check_token_lists()
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens must be from 0 to max_tokens",
            "min_tokens",
        )
        if self.seed is not None:
            _require(-(2**63) <= self.seed < 2**63, "seed must be a signed 64-bit integer", "seed")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _require(count is None or count >= 0, f"{name} must be at least 0", name)
        _require(
            self.logprobs is not None or not self.logprob_token_ids,
            "logprob_token_ids needs logprobs",
            "logprob_token_ids",
        )
        if self.beam_width is not None:
            self._check_beam_search(self.beam_width)

    def _check_beam_search(self, width: int) -> None:
        _require(1 <= self.n <= width, "n must be at most the beam width", "n")
        _require(self.max_tokens >= 1, "beam search needs max_tokens of at least 1", "max_tokens")
        _require(
            abs(self.length_penalty) <= MAX_LENGTH_PENALTY,
            f"length_penalty must be from -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}",
            "length_penalty",
        )
        neutral: dict[str, object] = {
            "temperature": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "logit_bias": (),
            "allowed_token_ids": None,
            "bad_words": (),
        }
        for name, value in neutral.items():
            _require(getattr(self, name) == value, f"{name} cannot be used with beam search", name)

    def _check_token_lists(self) -> None:
        _require(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            f"logit_bias has more than {MAX_LOGIT_BIAS} entries",
            "logit_bias",
        )
        for _, bias in self.logit_bias:
            _require(
                -100.0 <= bias <= 100.0, "logit_bias values must be from -100 to 100", "logit_bias"
            )
        _require(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            f"stop_token_ids has more than {MAX_STOP_TOKEN_IDS} entries",
            "stop_token_ids",
        )
        _require(
            len(self.logprob_token_ids) <= MAX_LOGPROB_TOKEN_IDS,
            f"logprob_token_ids has more than {MAX_LOGPROB_TOKEN_IDS} entries",
            "logprob_token_ids",
        )
        _require(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids must not be empty",
            "allowed_token_ids",
        )

        _require(
            len(self.bad_words) <= MAX_BAD_WORDS
            and all(1 <= len(word) <= MAX_BAD_WORD_TOKENS for word in self.bad_words),
            f"bad_words may be {MAX_BAD_WORDS} sequences of 1 to {MAX_BAD_WORD_TOKENS} tokens",
            "bad_words",
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidRequestError if a token id is outside [0, vocab_size).

        Raise it also if the vocabulary is too small for the beam search, which must find
        `beam_width` tokens that do not stop.
        """
        width = 0 if self.beam_width is None else self.beam_width + len(self.stop_token_ids)
        _require(2 * width <= vocab_size, "too many beams for the vocabulary", "n")
        lists = {
            "logit_bias": [token_id for token_id, _ in self.logit_bias],
            "stop_token_ids": self.stop_token_ids,
            "logprob_token_ids": self.logprob_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": [token_id for word in self.bad_words for token_id in word],
        }
        for name, token_ids in lists.items():
            for token_id in token_ids:
                _require(
                    0 <= token_id < vocab_size,
                    f"{name}: token id {token_id} is outside the vocabulary of {vocab_size}",
                    name,
                )

    @property
    def greedy(self) -> bool:
        """Whether each step takes the most likely token."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
