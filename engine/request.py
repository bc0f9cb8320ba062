"""A client's request to the engine: immutable and tokenised."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from .errors import ContextLengthError, InvalidRequestError, PoolTooSmallError
from .layers.layer_groups import blocks_needed, longest_that_fits
from .reasoning import ReasoningSpec
from .sampling_params import SamplingParams

GrammarKind = Literal["json", "regex", "choice", "grammar", "structural_tag", "nested"]
Pooling = Literal["last", "mean", "weightedmean", "max", "classify"]
"""How a prompt's hidden states become one vector: the last state, their mean, their mean weighted
by position (state n, counted from 1, has weight n), the maximum of each component, or the logits
that the model's classifier makes of the last state."""


class Capacity(Protocol):
    """The facts about an engine that decide whether a request can ever run; EngineInfo has them.

    `num_blocks` is the size of the whole KV pool. `group_windows` are how many tokens each group of
    layers keeps, and `step_tokens` those of steps whose results have not arrived.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def group_windows(self) -> tuple[int | None, ...]: ...
    @property
    def step_tokens(self) -> int: ...
    @property
    def can_generate(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """The grammar that an answer must match.

    By `kind`, `text` is a JSON schema ("json"), a regular expression, a JSON list of strings
    ("choice"), a Lark or GBNF grammar, the JSON of structural tags (see `_tags_to_lark` in
    grammar/compile.py), or a grammar within another ("nested", see `nested`).
    """

    kind: GrammarKind
    text: str

    @classmethod
    def nested(cls, rules: str, answer: GrammarSpec) -> GrammarSpec:
        """Return the Lark grammar `rules`, whose rule `answer`, which it lacks, is `answer`."""
        parts = {"rules": rules, "kind": answer.kind, "text": answer.text}
        return cls("nested", json.dumps(parts, ensure_ascii=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, and how to continue it.

    `request_id` is unique within the engine; the HTTP process makes it, since a client's own id
    need not be. Times are in seconds of the holder's `time.monotonic()`; between processes they are
    relative (see `wire.Add`).
    `queue_deadline` bounds the wait for the first step, `deadline` the whole request. A lower
    `priority` goes first. Requests share cached blocks only with requests of the same `cache_salt`.
    Every choice matches `grammar`, unless it reaches max_tokens before the grammar's end. The
    policy "fair" charges the request to `user`; all requests with None count as one user.
    `prediction` holds tokens that the client expects as the answer; they are drafts, and change
    nothing but the time. If `pooling` is set, the prompt is computed for its embedding and nothing
    is generated. `reasoning` is given if the reasoning of each choice has a budget. `adapter` names
    the LoRA adapter that the model is to have; None means the model as it is. Whoever chose this
    engine among several expects `expected_cached_tokens` of the prompt in its cache; only the
    statistics of waiting work depend on it.

    `resume` continues a request that another engine began, one entry for each choice: the tokens
    that it has delivered, which count as output in every way and are not sent again, or None if it
    has ended. It is empty for a new request. With the same seed and the same model, each choice
    goes on exactly as it would have gone on there. `on_trial` requests were computed by several
    engines that died; they begin one at a time, so that the one that killed them is found.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    arrival_time: float
    queue_deadline: float | None = None
    deadline: float | None = None
    priority: int = 0
    cache_salt: str | None = None
    grammar: GrammarSpec | None = None
    pooling: Pooling | None = None
    user: str | None = None
    reasoning: ReasoningSpec | None = None
    adapter: str | None = None
    prediction: tuple[int, ...] = ()
    resume: tuple[tuple[int, ...] | None, ...] = ()
    on_trial: bool = False
    expected_cached_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise InvalidRequestError("the prompt is empty", "prompt")
        if self.grammar is not None and self.sampling_params.beam_width is not None:
            raise InvalidRequestError("beam search cannot follow a grammar", "use_beam_search")
        if self.reasoning is not None:
            self._check_reasoning()
        if self.pooling is not None:
            nothing = SamplingParams(max_tokens=0)
            if self.sampling_params != nothing or self.grammar is not None:
                raise InvalidRequestError("an embedding samples nothing", "sampling_params")
        if self.resume:
            self._check_resume()

    def _check_reasoning(self) -> None:
        name = "thinking_token_budget"
        if self.sampling_params.beam_width is not None:
            raise InvalidRequestError(f"beam search cannot follow a {name}", "use_beam_search")
        if self.sampling_params.allowed_token_ids is not None:
            raise InvalidRequestError(
                f"{name} cannot be combined with allowed_token_ids", "allowed_token_ids"
            )

    def _check_resume(self) -> None:
        params = self.sampling_params
        if self.pooling is not None or params.beam_width is not None:
            raise InvalidRequestError("embeddings and beam searches cannot be resumed", "resume")
        if len(self.resume) != params.n or not self.open_choices:
            raise InvalidRequestError("resume needs an entry for each choice, one open", "resume")
        if max(len(tokens or ()) for tokens in self.resume) >= max(params.max_tokens, 1):
            raise InvalidRequestError("a resumed choice has reached max_tokens", "resume")

    @property
    def open_choices(self) -> list[int]:
        """The choices that have not ended, ascending."""
        n = self.sampling_params.n
        return [i for i in range(n) if not self.resume or self.resume[i] is not None]

    @property
    def has_delivered(self) -> bool:
        """Whether another engine has delivered tokens of the request."""
        return any(tokens is None or tokens for tokens in self.resume)

    def with_seed(self, seed: int) -> Request:
        """Return the request with this seed if it draws at random and brings none."""
        params = self.sampling_params
        if params.seed is not None or params.greedy or self.pooling is not None:
            return self
        return replace(self, sampling_params=replace(params, seed=seed))

    def shifted(self, seconds: float) -> Request:
        """Return the request with all its times moved by so many seconds, to another clock."""
        queue_deadline, deadline = self.queue_deadline, self.deadline
        return replace(
            self,
            arrival_time=self.arrival_time + seconds,
            queue_deadline=None if queue_deadline is None else queue_deadline + seconds,
            deadline=None if deadline is None else deadline + seconds,
        )

    def check_fits(self, capacity: Capacity) -> None:
        """Raise InvalidRequestError if an engine of this capacity can never run the request.

        The check counts the full max_tokens, because preemption frees the blocks of other sequences
        but never a sequence's own. Beams share the full blocks of the prompt and, in the worst
        case, nothing else.
        """
        max_model_len, vocab_size = capacity.max_model_len, capacity.vocab_size
        if self.pooling is None and not capacity.can_generate:
            raise InvalidRequestError(
                "the model's weights have no language-model head: it only makes embeddings",
                "model",
            )
        prompt = self.prompt_token_ids
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise InvalidRequestError(
                f"prompt has a token id outside the vocabulary of {vocab_size}", "prompt"
            )
        if self.reasoning is not None and max(self.reasoning.forced_ids, default=0) >= vocab_size:
            raise InvalidRequestError(
                "the end of the reasoning is outside the vocabulary", "thinking_token_budget"
            )
        for tokens in self.resume:
            if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
                raise InvalidRequestError("a token id is outside the vocabulary", "resume")
        params = self.sampling_params
        params.check_vocabulary(vocab_size)
        total = len(prompt) + params.max_tokens
        # The last sampled token is never fed back, so it needs no slot in the cache.
        if total > max_model_len or len(prompt) >= max_model_len + (params.max_tokens == 0):
            raise ContextLengthError(
                f"This model's maximum context length is {max_model_len} tokens, but the prompt "
                f"has {len(prompt)} tokens and max_tokens is {params.max_tokens}",
                "max_tokens" if len(prompt) < max_model_len else "prompt",
            )
        self._check_blocks(capacity, total)

    def _check_blocks(self, capacity: Capacity, total: int) -> None:
        """Raise PoolTooSmallError if `total` tokens of each beam need more blocks than exist."""
        params, num_blocks, size = self.sampling_params, capacity.num_blocks, capacity.block_size
        windows, step_tokens = capacity.group_windows, capacity.step_tokens
        needed = blocks_needed(
            windows,
            size,
            total - (params.max_tokens > 0),
            num_shared=len(self.prompt_token_ids),
            width=params.beam_width or 1,
            step_tokens=step_tokens,
        )
        if needed > num_blocks:
            most = num_blocks * size
            held = longest_that_fits(windows, size, num_blocks, most, step_tokens=step_tokens)
            beams = "" if params.beam_width is None else f" in {params.beam_width} beams"
            what = f"prompt and max_tokens{beams} need" if params.max_tokens else "prompt needs"
            raise PoolTooSmallError(
                f"{what} more KV cache for {total} tokens than there is: {needed} blocks of the "
                f"pool's {num_blocks}, which hold {held} tokens of one sequence",
                "max_tokens" if params.max_tokens else "prompt",
            )
