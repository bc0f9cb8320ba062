"""Runs a job through the engine: token ids come in, the text of each choice goes out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import structlog

from ...engine.errors import EngineDeadError, QuireError, error_from_code
from ...engine.outputs import FinishReason, SequenceOutput, Timings, TokenLogprobs
from ...engine.reasoning import ReasoningTracker
from ..http.limits import Ticket
from ..http.middleware import connection
from ..metrics.histograms import RequestRecord, exemplar
from ..text.detokenizer import Detokenizer
from ..tracing.current import EndedGeneration, current
from .choice import Choice, Delta
from .job import Job
from .merged_outputs import merged_outputs
from .state import ServerState

log = structlog.get_logger(__name__)

CONTEXT_TOKENS = 4
"""Tokens of the prompt's end that a detokenizer gets if the tokenizer is not byte-level."""


class Generation:
    """Runs a job. Closing the iterator of `deltas` early aborts the sequences that still run."""

    def __init__(self, state: ServerState, job: Job, ticket: Ticket, log_id: str) -> None:
        self._state = state
        self._job = job
        self._ticket = ticket
        self._log_id = log_id
        self.prompt_logprobs: list[list[TokenLogprobs | None] | None]
        self.prompt_logprobs = [None] * len(job.requests)
        self.embeddings: list[bytes | None] = [None] * len(job.requests)
        self._cached_tokens = [0] * len(job.requests)
        self._prompts_counted = [False] * len(job.requests)
        self._timings: list[Timings | None] = [None] * len(job.requests)
        self._preemptions = [0] * len(job.requests)
        self._trace = current.get()
        if self._trace is not None:
            self._trace.generation_began()
        self._exemplar = exemplar(log_id, self._trace.trace_id if self._trace else None)
        self._error: str | None = None
        """The code of the error with which a sequence failed."""
        self._is_placed = False
        self._accepted, self._rejected = 0, 0
        """Tokens of predictions that were right, and that were tried and wrong."""
        self._skips_special, self._hidden = job.skip_special_tokens, dict[int, str]()
        if self._skips_special:
            self._skips_special, self._hidden = state.tokenizer.skipped_but(
                job.shown_tokens, job.stops
            )
        self.choices = [
            [self._new_choice(position, number) for number in range(request.sampling_params.n)]
            for position, request in enumerate(job.requests)
        ]

    def _new_choice(self, position: int, number: int) -> Choice:
        job, tokenizer = self._job, self._state.tokenizer
        request = job.requests[position]
        context: Sequence[int] = ()
        if not tokenizer.byte_level:
            context = request.prompt_token_ids[-CONTEXT_TOKENS:]
        detokenizer = Detokenizer(
            tokenizer.backend,
            skip_special_tokens=self._skips_special,
            hidden=self._hidden,
            stops=job.stops,
            include_stop=job.include_stop,
            min_tokens=request.sampling_params.min_tokens,
            context=context,
            with_offsets=request.sampling_params.logprobs is not None,
        )
        return Choice(
            position * request.sampling_params.n + number,
            number,
            detokenizer,
            reasoning=None if job.reasoning is None else ReasoningTracker(job.reasoning),
        )

    @property
    def num_prompts(self) -> int:
        """The number of prompts."""
        return len(self._job.requests)

    @property
    def num_prompt_tokens(self) -> int:
        """The tokens of all prompts."""
        return sum(len(request.prompt_token_ids) for request in self._job.requests)

    def prompt_token_ids(self, position: int) -> tuple[int, ...]:
        """Return the token ids of one prompt."""
        return self._job.requests[position].prompt_token_ids

    def usage(self) -> dict[str, Any]:
        """Return the token counts so far. They include the sequences that best_of drops."""
        prompt = self.num_prompt_tokens
        choices = [choice for group in self.choices for choice in group]
        completion = sum(choice.num_tokens for choice in choices)
        reasoning = sum(
            choice.reasoning.num_reasoning_tokens for choice in choices if choice.reasoning
        )
        details = {"reasoning_tokens": reasoning}
        if any(request.prediction for request in self._job.requests):
            details["accepted_prediction_tokens"] = self._accepted
            details["rejected_prediction_tokens"] = self._rejected
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
            "completion_tokens_details": details,
        }

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of all choices as they come; the last one of each has a finish_reason.

        Raises the QuireError with which a sequence failed, and aborts the other sequences.
        """
        requests = self._job.requests
        try:
            async with aclosing(merged_outputs(self._state.engine, requests)) as outputs:
                async for position, output in outputs:
                    self._ticket.started()
                    if not self._is_placed:
                        self._note_engine(output.request_id)
                    if output.error is not None:
                        self.choices[position][output.choice].finish_reason = "error"
                        raise error_from_code(output.error.code, output.error.message)
                    delta = self._take(position, output)
                    if delta is not None:
                        yield delta
            if any(choice.finish_reason is None for group in self.choices for choice in group):
                raise EngineDeadError("the engine ended the request without a reason")
        except QuireError as error:
            self._error = error.code
            raise
        finally:
            for position, group in enumerate(self.choices):
                if any(choice.finish_reason is None for choice in group):
                    self._state.engine.abort(requests[position].request_id)
            self._ticket.close()
            self._record()

    def _note_engine(self, request_id: str) -> None:
        """Name the engine in the answer's headers, if there are several."""
        self._is_placed = True
        engine, present = self._state.engine.engine_of(request_id), connection.get()
        if engine is not None and present is not None:
            present.answer_headers["x-quire-engine"] = engine

    def _take(self, position: int, output: SequenceOutput) -> Delta | None:
        """Add a step's output to its choice. Returns the delta that it makes certain, or None."""
        # 1. Store the values that belong to the prompt.
        if output.num_cached_tokens is not None:
            self._cached_tokens[position] = output.num_cached_tokens
        if not self._prompts_counted[position]:
            self._count_prompt(position)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[position] = output.prompt_logprobs
        if output.embedding is not None:
            self.embeddings[position] = output.embedding
        if output.timings is not None:
            self._timings[position] = output.timings
            self._preemptions[position] += output.timings.num_preemptions
        if output.predicted is not None:
            self._accepted += output.predicted[0]
            self._rejected += output.predicted[1]
        # 2. Ignore a choice that a stop string has ended: its abort brings one more output.
        choice = self.choices[position][output.choice]
        if choice.finish_reason is not None:
            return None
        self._observe_latency(choice, output)
        # 3. Decode. The token that ended a choice is not part of its text, but is counted; tokens
        #    after a stop string are neither.
        detokenizer = choice.detokenizer
        shown = output.token_ids
        if output.finish_reason == "stop" and not self._job.include_stop:
            shown = shown[:-1]
        text, num_read = detokenizer.feed(shown)
        if detokenizer.stop is None and num_read < len(output.token_ids):
            text += detokenizer.end(output.token_ids[-1])
            num_read = len(output.token_ids)
        if detokenizer.stop is None and output.finish_reason is not None:
            text += detokenizer.finish()
        self._count(choice, output, num_read)
        # 4. End the choice: for the engine's reason or at a stop string, which wins over it. The
        #    engine does not know stop strings, so it must be told to stop.
        stop_reason: int | str | None = None
        if detokenizer.stop is None and output.finish_reason is not None:
            choice.finish_reason, stop_reason = output.finish_reason, output.stop_reason
        if detokenizer.stop is not None:
            choice.finish_reason, stop_reason = "stop", detokenizer.stop
            if output.finish_reason is None:
                self._state.engine.abort(output.request_id, output.choice)
        # 5. Tokens that gave no text wait for the delta that brings it.
        if not text and choice.finish_reason is None:
            return None
        return choice.take_delta(text, stop_reason)

    def _count(self, choice: Choice, output: SequenceOutput, num_tokens: int) -> None:
        """Add the first `num_tokens` tokens of an output to its choice and to the metrics."""
        choice.num_tokens += num_tokens
        self._state.metrics.tokens_generated(num_tokens)
        self._ticket.generated(num_tokens)
        choice.pending_ids += output.token_ids[:num_tokens]
        if (offsets := choice.detokenizer.offsets) is not None:
            offsets += [choice.detokenizer.length] * (num_tokens - len(offsets))
            choice.pending_offsets += offsets
            offsets.clear()
        if choice.reasoning is not None:
            choice.reasoning.read(output.token_ids[:num_tokens])
        if output.logprobs is not None:
            entries = output.logprobs[:num_tokens]
            choice.pending_logprobs += entries
            choice.logprob_sum += sum(entry.logprob for entry in entries)

    def _count_prompt(self, position: int) -> None:
        self._prompts_counted[position] = True
        self._state.metrics.prompt_read(
            len(self._job.requests[position].prompt_token_ids), self._cached_tokens[position]
        )

    def _observe_latency(self, choice: Choice, output: SequenceOutput) -> None:
        """Report the time since a choice's last tokens, or the time to its first token if it is the
        first choice of a prompt."""
        if not output.token_ids:
            return
        now = time.monotonic()
        if choice.last_token_time is not None:
            self._state.metrics.inter_token(now - choice.last_token_time)
        elif choice.number == 0:
            waited = now - self._job.requests[0].arrival_time
            self._state.metrics.first_token(waited, self._exemplar)
        choice.last_token_time = now

    def _record(self) -> None:
        """Report the finished requests to the metrics and, if enabled, to the log and the trace."""
        records = []
        for position, request in enumerate(self._job.requests):
            group = self.choices[position]
            if not self._prompts_counted[position]:
                self._count_prompt(position)
            reasons: list[FinishReason] = [choice.finish_reason or "abort" for choice in group]
            record = RequestRecord(
                prompt_tokens=len(request.prompt_token_ids),
                max_tokens=request.sampling_params.max_tokens,
                finish_reasons=tuple(reasons),
                generation_tokens=tuple(choice.num_tokens for choice in group),
                timings=self._timings[position],
                preemptions=self._preemptions[position],
                exemplar=self._exemplar,
            )
            records.append(record)
            self._state.metrics.request_finished(record)
            key_name = self._ticket.key_name
            self._state.key_metrics.finished(
                key_name, record.prompt_tokens, sum(record.generation_tokens)
            )
            if self._state.settings.enable_log_requests:
                log.info(
                    "request_finished",
                    request_id=self._log_id,
                    engine_request_id=request.request_id,
                    prompt_tokens=record.prompt_tokens,
                    generation_tokens=record.generation_tokens,
                    finish_reasons=reasons,
                    seconds=round(time.monotonic() - request.arrival_time, 4),
                    key=key_name or None,
                )
        if self._trace is not None:
            cached = sum(self._cached_tokens)
            self._trace.generation_ended(
                EndedGeneration(self._job.requests, records, cached, self._error)
            )


class Finished(NamedTuple):
    """A finished choice of an answer that is not streamed. `position` is that of its prompt."""

    choice: Choice
    position: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason
    stop_reason: int | str | None
    offsets: list[int]


async def collect(generation: Generation, n: int) -> list[list[Finished]]:
    """Run to the end, and return the choices of each prompt.

    If there are more than `n`, the best `n` are returned, ranked by the mean log-probability of
    their tokens.
    """
    parts: dict[int, list[Delta]] = {}
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            parts.setdefault(delta.choice, []).append(delta)
    answers = []
    for position, group in enumerate(generation.choices):
        chosen = group
        if len(group) > n:
            chosen = sorted(group, key=lambda choice: -choice.mean_logprob)[:n]
        answers.append([_finished(choice, position, parts[choice.index]) for choice in chosen])
    return answers


def _finished(choice: Choice, position: int, deltas: list[Delta]) -> Finished:
    assert choice.finish_reason is not None  # `deltas` would have raised
    return Finished(
        choice,
        position,
        "".join(delta.text for delta in deltas),
        [token_id for delta in deltas for token_id in delta.token_ids],
        [entry for delta in deltas for entry in delta.logprobs],
        choice.finish_reason,
        deltas[-1].stop_reason,
        [offset for delta in deltas for offset in delta.offsets],
    )
