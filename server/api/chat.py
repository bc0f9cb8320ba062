"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import cached_property
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..errors import client_left
from ..http.body import read_json_object
from ..http.limits import Ticket
from ..http.route_docs import GENERATION_ERRORS, answers, errors, json_body
from ..http.sse import run_until_disconnect
from ..parsing.formats.message_format import prompt_end
from ..parsing.message_events import MessageBuilder, delta_of, joined
from ..parsing.message_parser import MessageParser
from ..requests.choice import Delta
from ..requests.generation import Finished, Generation, collect
from ..requests.job import Job
from ..requests.preparation import asked_by, prepare_chat, response_id
from ..requests.protocol import ChatBody, validate
from ..requests.state import ServerState, state_of
from ..requests.tool_choice import (
    allows_many_calls,
    offered_tools,
    unenforced,
    without_effect,
)
from ..requests.unsupported import refuse_ignored
from .answers import GENERATION, Envelope, ignored_header, refusals_counted, stream_of
from .call_forms import CallForm, call_form
from .logprobs import LogprobFormat
from .whole_answers import json_answer, num_values

router = APIRouter(tags=["completions"])


@router.post(
    "/v1/chat/completions",
    response_model=None,
    openapi_extra=json_body(ChatBody),
    responses={**answers(GENERATION, stream=True), **errors(*GENERATION_ERRORS)},
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, whole or as a stream."""
    state = state_of(request)
    with refusals_counted(state.metrics):
        fields = await read_json_object(request)
        body, ignored = validate(ChatBody, fields, strict=state.settings.strict)
        pointless = without_effect(body)
        if state.settings.strict:
            refuse_ignored(pointless)
        ignored += pointless
        state.check_model(body.model)
        answer_id = response_id("chatcmpl", request, body)
        owner = state.keys.owner(request)
        chat = await Chat.start(state, body, answer_id, request.state.request_id, owner)
    job, ticket = chat.job, chat.ticket
    ignored += job.ignored
    if job.requests[0].grammar is None:
        ignored += unenforced(body)
    headers = ignored_header(ignored, job.prompt_changes)
    if body.stream:
        return stream_of(request, chat.events(), chat.failure, ticket, job.deadline, headers)
    with ticket:
        answers = await run_until_disconnect(
            request.receive, collect(chat.generation, job.n), job.deadline
        )
    if answers is None:
        return client_left()
    finished = answers[0]
    return await json_answer(lambda: chat.whole(finished), chat.num_values(finished), headers)


class Chat:
    """One admitted conversation and its answer: `whole`, as `events`, or as `choices`.

    The other chat APIs are written on top of `choices`.
    """

    def __init__(
        self,
        state: ServerState,
        body: ChatBody,
        job: Job,
        ticket: Ticket,
        answer_id: str,
        log_id: str,
    ) -> None:
        self.job = job
        self.ticket = ticket
        self.generation = Generation(state, job, ticket, log_id)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._state = state
        self._body = body
        self._envelope = Envelope(
            answer_id,
            kind,
            body,
            self.generation,
            model=state.name_of(body.model),
            fingerprint=state.fingerprint(body.model),
        )
        self._logprobs = LogprobFormat(
            state.tokenizer,
            as_ids=bool(body.return_tokens_as_token_ids),
            named=body.logprob_token_ids,
        )

    @classmethod
    async def start(
        cls,
        state: ServerState,
        body: ChatBody,
        answer_id: str,
        log_id: str,
        owner: bytes,
        *,
        caps_max_tokens: bool = False,
    ) -> Chat:
        """Admit a conversation. Raises QuireError if it is refused.

        `log_id` names the request in the log and `owner` its API key. With `caps_max_tokens`, a
        max_tokens beyond the room that is left is reduced instead of refused, and `job.ignored`
        names it. The caller must close `ticket`.
        """
        job, ticket = await prepare_chat(state, body, caps_max_tokens=caps_max_tokens)
        job = asked_by(job, owner, body.user)
        return cls(state, body, job, ticket, answer_id, log_id)

    @cached_property
    def _tools(self) -> dict[str, dict[str, Any]]:
        """The JSON schemas of the offered tools' arguments, by the tools' names."""
        functions = (tool["function"] for tool in offered_tools(self._body))
        return {function["name"]: function["parameters"] for function in functions}

    def _new_parser(self) -> MessageParser:
        body = self._body
        prompt = self.generation.prompt_token_ids(0)
        return self._state.message_format.parser(
            self._tools,
            prompt_end=prompt_end(self._state.tokenizer, prompt),
            continued=body.messages[-1].content if body.continue_final_message else None,
            show_reasoning=body.include_reasoning is not False,
            parallel_calls=allows_many_calls(body),
            call_openings=self.job.call_openings,
        )

    def num_values(self, answers: list[Finished]) -> int:
        """Return the number of values in the answer in one piece."""
        asked = num_values(answers, self._body.top_logprobs or 0)
        entries = self.generation.prompt_logprobs[0] or ()
        asked += len(entries) * (2 + (self._body.prompt_logprobs or 0))
        if self._body.return_token_ids:
            asked += len(self.generation.prompt_token_ids(0))
        return asked

    def whole(self, answers: list[Finished]) -> dict[str, Any]:
        """Return the answer in one piece."""
        body = self._body
        answer = self._envelope.whole(
            [self._choice(index, finished) for index, finished in enumerate(answers)]
        )
        answer["prompt_logprobs"] = answer["prompt_token_ids"] = None
        if body.prompt_logprobs is not None:
            entries = self.generation.prompt_logprobs[0] or ()
            answer["prompt_logprobs"] = self._logprobs.prompt(entries)
        if body.return_token_ids:
            answer["prompt_token_ids"] = list(self.generation.prompt_token_ids(0))
        return answer

    def _choice(self, index: int, finished: Finished) -> dict[str, Any]:
        parser, builder, form = self._new_parser(), MessageBuilder(), call_form(self._body)
        builder.add(parser.feed(finished.text) + parser.finish())
        choice: dict[str, Any] = {
            "index": index,
            "message": form.message(builder.message()),
            "logprobs": None,
            "finish_reason": form.finish_reason(parser.finish_reason(finished.finish_reason)),
            "stop_reason": finished.stop_reason,
            "token_ids": finished.token_ids if self._body.return_token_ids else None,
        }
        if self._body.logprobs:
            choice["logprobs"] = self._logprobs.chat(
                finished.logprobs, self._body.top_logprobs or 0
            )
        return choice

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream, except its end."""
        envelope = self._envelope
        async with aclosing(self.choices()) as choices:
            async for choice in choices:
                yield self._chunk(choice)
        if envelope.include_usage:
            yield envelope.usage_chunk()

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        """Return the event of a chunk; the first of all has the prompt's ids, if asked for."""
        opening = "role" in choice["delta"]
        prompt = None
        if opening and choice["index"] == 0 and self._body.return_token_ids:
            prompt = self.generation.prompt_token_ids(0)
        return self._envelope.chunk(choice, opening=opening, prompt_token_ids=prompt)

    async def choices(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the entries of `choices` of a stream's chunks.

        Each choice begins with its role and ends with a finish_reason. Raises QuireError.
        """
        parsers = [(self._new_parser(), call_form(self._body)) for _ in range(self.job.n)]
        begun = False
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                if not begun:
                    begun = True
                    for index in range(self.job.n):
                        yield self._role_choice(index)
                for choice in self._pieces(*parsers[delta.choice], delta):
                    yield choice

    def _pieces(self, parser: MessageParser, form: CallForm, delta: Delta) -> list[dict[str, Any]]:
        """Return one entry of `choices` for each message event that `delta` brings.

        The last one carries what belongs to the delta's tokens: log-probabilities, ids and the
        finish_reason. If there is no event, an entry with an empty delta carries these, if any.
        """
        body = self._body
        events = parser.feed(delta.text)
        if delta.finish_reason is not None:
            events = joined(events + parser.finish())
        changes = form.deltas(
            [delta_of(event) for event in events], ended=delta.finish_reason is not None
        )
        if not changes and (delta.finish_reason or body.logprobs or body.return_token_ids):
            changes = [{}]
        pieces: list[dict[str, Any]] = [
            {
                "index": delta.choice,
                "delta": change,
                "logprobs": None,
                "finish_reason": None,
                "stop_reason": None,
            }
            for change in changes
        ]
        if pieces:
            last = pieces[-1]
            last["finish_reason"] = form.finish_reason(parser.finish_reason(delta.finish_reason))
            last["stop_reason"] = delta.stop_reason
            if body.logprobs:
                last["logprobs"] = self._logprobs.chat(delta.logprobs, body.top_logprobs or 0)
            if body.return_token_ids:
                last["token_ids"] = delta.token_ids
        return pieces

    def _role_choice(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def failure(self) -> list[bytes]:
        """Return terminal chunks for the choices that have none yet."""
        return [
            self._envelope.chunk(
                {
                    "index": index,
                    "delta": {},
                    "logprobs": None,
                    "finish_reason": "error",
                    "stop_reason": None,
                }
            )
            for index in self._envelope.unfinished()
        ]
