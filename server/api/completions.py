"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..errors import client_left
from ..http.body import read_json_object
from ..http.route_docs import GENERATION_ERRORS, answers, errors, json_body
from ..http.sse import run_until_disconnect
from ..requests.generation import Delta, Finished, Generation, collect
from ..requests.preparation import asked_by, prepare_completion, prompts_of, response_id
from ..requests.protocol import CompletionBody, validate
from ..requests.state import state_of
from ..text.tokenizer import Tokenizer
from .answers import GENERATION, Envelope, ignored_header, refusals_counted, stream_of
from .echo import Echo, echo_of
from .logprobs import LogprobFormat

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
    return JSONResponse(await writer.whole(answers), headers=headers)


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

    async def whole(self, answers: list[list[Finished]]) -> dict[str, Any]:
        """Return the answer in one piece."""
        choices: list[dict[str, Any]] = []
        for position, group in enumerate(answers):
            prompt_ids = self._generation.prompt_token_ids(position)
            echo = await self._echo(position)
            for finished in group:
                choices.append(self._choice(len(choices), finished, prompt_ids, echo))
        return self._envelope.whole(choices)

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
                starts.setdefault(delta.choice, len(echo.text))
                choice = self._chunk(delta, echo.text)
                if first and self._body.return_token_ids:
                    choice["prompt_token_ids"] = list(self._generation.prompt_token_ids(position))
                if self._body.logprobs is not None:
                    choice["logprobs"] = self._logprobs_of(
                        delta,
                        self._body.logprobs,
                        echo,
                        position if first else None,
                        starts[delta.choice],
                    )
                yield envelope.chunk(choice)
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

    def _chunk(self, delta: Delta, echo: str) -> dict[str, Any]:
        body = self._body
        choice: dict[str, Any] = {
            "index": delta.choice,
            "text": echo + delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

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
