"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..errors import client_left
from ..http.body import read_json_object
from ..http.route_docs import GENERATION_ERRORS, answers, errors, json_body
from ..http.sse import run_until_disconnect
from ..requests.choice import Delta
from ..requests.generation import Finished, Generation, collect
from ..requests.preparation import asked_by, prepare_completion, prompts_of, response_id
from ..requests.protocol import CompletionBody, validate
from ..requests.state import state_of
from ..text.tokenizer import Tokenizer
from .answers import GENERATION, Envelope, ignored_header, refusals_counted, stream_of
from .echo import Echo, echo_of
from .logprobs import LogprobFormat
from .whole_answers import LARGE, in_thread_if, json_answer, num_values

router = APIRouter(tags=["completions"])


@router.post(
    "/v1/completions",
    response_model=None,
    openapi_extra=json_body(CompletionBody),
    responses={**answers(GENERATION, stream=True), **errors(*GENERATION_ERRORS)},
)
async def create_completion(request: Request) -> Response:
    """Continue one or more prompts, whole or as a stream."""
    state = state_of(request)
    with refusals_counted(state.metrics):
        fields = await read_json_object(request)
        body, ignored = validate(CompletionBody, fields, strict=state.settings.strict)
        state.check_model(body.model)
        answer_id = response_id("cmpl", request, body)
        job, ticket = await prepare_completion(state, body)
    job = asked_by(job, state.keys.owner(request), body.user)
    generation = Generation(state, job, ticket, request.state.request_id)
    envelope = Envelope(
        answer_id,
        "text_completion",
        body,
        generation,
        model=state.name_of(body.model),
        fingerprint=state.fingerprint(body.model),
    )
    writer = _CompletionWriter(envelope, body, generation, state.tokenizer)
    headers = ignored_header(ignored)
    if body.stream:
        return stream_of(request, writer.events(), writer.failure, ticket, job.deadline, headers)
    with ticket:
        answers = await run_until_disconnect(
            request.receive, collect(generation, job.n), job.deadline
        )
    if answers is None:
        return client_left()
    size = writer.num_values(answers)
    return await json_answer(await writer.whole(answers), size, headers)


class _CompletionWriter:
    """Writes the answer to one request, whole or in chunks."""

    def __init__(
        self,
        envelope: Envelope,
        body: CompletionBody,
        generation: Generation,
        tokenizer: Tokenizer,
    ) -> None:
        self._envelope = envelope
        self._body = body
        self._generation = generation
        self._tokenizer = tokenizer
        self._logprobs = LogprobFormat(
            tokenizer,
            as_ids=bool(body.return_tokens_as_token_ids),
            named=body.logprob_token_ids,
        )
        self._width = body.n or 1
        self._prompts = prompts_of(body.prompt, generation.num_prompts)

    def num_values(self, answers: list[list[Finished]]) -> int:
        """Return the number of values in the answer in one piece."""
        top = self._body.logprobs or 0
        return sum(
            num_values(group, top) + len(group) * self._num_prompt_values(position)
            for position, group in enumerate(answers)
        )

    def _num_prompt_values(self, position: int) -> int:
        """Return the number of values that each choice of a prompt repeats of it."""
        body, generation = self._body, self._generation
        top = body.logprobs if body.prompt_logprobs is None else body.prompt_logprobs
        count = len(generation.prompt_logprobs[position] or ()) * (2 + (top or 0))
        if body.echo or body.return_token_ids:
            count += len(generation.prompt_token_ids(position))
        return count

    async def whole(self, answers: list[list[Finished]]) -> Callable[[], dict[str, Any]]:
        """Return a function that makes the answer in one piece."""
        parts = []
        for position, group in enumerate(answers):
            prompt_ids = self._generation.prompt_token_ids(position)
            echo = await self._echo(position)
            parts += [(finished, prompt_ids, echo) for finished in group]
        return lambda: self._envelope.whole(
            [self._choice(index, *part) for index, part in enumerate(parts)]
        )

    def _choice(
        self, index: int, finished: Finished, prompt_ids: tuple[int, ...], echo: Echo
    ) -> dict[str, Any]:
        body = self._body
        prompt_entries = self._generation.prompt_logprobs[finished.position]
        logprobs = None
        if body.logprobs is not None:
            logprobs = self._logprobs_of(finished, body.logprobs, echo, finished.position)
        choice: dict[str, Any] = {
            "index": index,
            "text": echo.text + finished.text,
            "logprobs": logprobs,
            "finish_reason": finished.finish_reason,
            "stop_reason": finished.stop_reason,
        }
        choice |= dict.fromkeys(("prompt_logprobs", "prompt_token_ids", "token_ids"))
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._logprobs.prompt(prompt_entries or ())
        if body.return_token_ids:
            choice["prompt_token_ids"] = list(prompt_ids)
            choice["token_ids"] = finished.token_ids
        return choice

    async def _echo(self, position: int) -> Echo:
        """Return the echo of the prompt at `position`; it is empty if none is asked for."""
        if not self._body.echo:
            return Echo()
        token_ids = self._generation.prompt_token_ids(position)
        return await echo_of(self._tokenizer, self._body, self._prompts[position], token_ids)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream, except its end."""
        envelope = self._envelope
        # Characters before the text of each choice. A choice without a chunk is missing here.
        starts: dict[int, int] = {}
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                position = delta.choice // self._width
                first = delta.choice not in starts
                echo = await self._echo(position) if first else Echo()
                start = starts.setdefault(delta.choice, len(echo.text))
                # The first chunk of a choice may bring the whole prompt.
                large = first and self._num_prompt_values(position) > LARGE
                write = partial(
                    self._chunk, delta, echo, position if first else None, start, large=large
                )
                yield await in_thread_if(large, write)
        if envelope.include_usage:
            yield envelope.usage_chunk()

    def _logprobs_of(
        self,
        part: Finished | Delta,
        top: int,
        echo: Echo,
        position: int | None,
        start: int | None = None,
    ) -> dict[str, Any]:
        """Return the log-probabilities of a part of a choice, whose text begins after `start`
        characters of the answer: by default, after the echo.

        If the prompt at `position` is echoed, its tokens come first. (Its log-probabilities have
        arrived by then: they come with the first token of its first choice.)
        """
        start = len(echo.text) if start is None else start
        token_ids, entries = part.token_ids, [*part.logprobs]
        offsets = [start + offset for offset in part.offsets]
        if not self._body.echo or position is None:
            return self._logprobs.completion(entries, token_ids, top, offsets)
        generation = self._generation
        prompt_entries = generation.prompt_logprobs[position] or ()
        return self._logprobs.completion(
            [*prompt_entries, *entries],
            [*generation.prompt_token_ids(position), *token_ids],
            top,
            [*echo.offsets, *offsets],
        )

    def _chunk(
        self, delta: Delta, echo: Echo, position: int | None, start: int, *, large: bool
    ) -> bytes:
        """Return the event of a delta. `position` is that of its prompt if it is the first of its
        choice, which brings what was asked for of the prompt; see `_logprobs_of` for `start`."""
        body = self._body
        choice: dict[str, Any] = {
            "index": delta.choice,
            "text": echo.text + delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if position is not None:
                choice["prompt_token_ids"] = list(self._generation.prompt_token_ids(position))
        if body.logprobs is not None:
            choice["logprobs"] = self._logprobs_of(delta, body.logprobs, echo, position, start)
        return self._envelope.chunk(choice, large=large)

    def failure(self) -> list[bytes]:
        """Return terminal chunks for the choices that have none yet."""
        return [
            self._envelope.chunk(
                {
                    "index": index,
                    "text": "",
                    "logprobs": None,
                    "finish_reason": "error",
                    "stop_reason": None,
                }
            )
            for index in self._envelope.unfinished()
        ]
