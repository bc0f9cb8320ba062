"""The outputs of a sequence that are more than one token."""

from __future__ import annotations

from ..outputs import FinishReason, RowError, SequenceOutput, Timings, TokenLogprobs
from ..sequence import Sequence


def token_output(
    sequence: Sequence, length: int, logprobs: TokenLogprobs | None, now: float
) -> SequenceOutput:
    """Make the output of the last of the sequence's first `length` tokens.

    That token is the first or the last of the sequence's output, or it has `logprobs`.
    """
    token_id = sequence.token_ids[length - 1]
    reason: FinishReason | None = None
    if token_id in sequence.stop_ids:
        reason = "stop"
    elif length >= sequence.stop_at:
        reason = "length"
    wanted = length <= sequence.stop_at  # max_tokens 0 only wants the prompt
    first = sequence.first_token_time is None
    if first:
        sequence.first_token_time = now
    return SequenceOutput(
        sequence.request.request_id,
        sequence.choice,
        [token_id] if wanted else [],
        logprobs=[logprobs] if logprobs and wanted else None,
        prompt_logprobs=prompt_logprobs(sequence) if first else None,
        finish_reason="length" if not wanted else reason,
        stop_reason=stop_reason(sequence, token_id) if reason == "stop" and wanted else None,
        num_cached_tokens=sequence.num_cached_tokens if first or reason else None,
        timings=timings(sequence, now) if reason else None,
    )


def embedding_output(sequence: Sequence, embedding: bytes, now: float) -> SequenceOutput:
    """Make the only output of a sequence whose prompt is pooled."""
    ended = ended_output(sequence, "stop", None, now)
    return ended._replace(embedding=embedding)


def ended_output(
    sequence: Sequence, reason: FinishReason, error: RowError | None, now: float
) -> SequenceOutput:
    """Make the output of a sequence that ends before its own last token."""
    return SequenceOutput(
        sequence.request.request_id,
        sequence.choice,
        [],
        finish_reason=reason,
        error=error,
        num_cached_tokens=sequence.num_cached_tokens,
        timings=timings(sequence, now),
    )


def prompt_logprobs(sequence: Sequence) -> list[TokenLogprobs | None] | None:
    """Return the prompt's log-probabilities if asked for; they come with choice 0."""
    asked = sequence.request.sampling_params.prompt_logprobs is not None
    return sequence.prompt_logprobs if asked and sequence.choice == 0 else None


def stop_reason(sequence: Sequence, token_id: int) -> int | None:
    """Return the token if the request named it as a stop token; None for end-of-sequence."""
    return token_id if token_id in sequence.request.sampling_params.stop_token_ids else None


def take_prompt_logprobs(sequence: Sequence, start: int, entries: list[TokenLogprobs]) -> None:
    """Append the entries for positions start + 1 …, without those known from before a recompute."""
    known = len(sequence.prompt_logprobs) - (start + 1)
    sequence.prompt_logprobs.extend(entries[known:])


def timings(sequence: Sequence, now: float) -> Timings:
    """Return the times of a sequence that ends now."""
    arrival = sequence.request.arrival_time
    scheduled, first_token = sequence.scheduled_time, sequence.first_token_time
    return Timings(
        None if scheduled is None else scheduled - arrival,
        None if first_token is None else first_token - arrival,
        now - arrival,
        sequence.num_preemptions,
    )
