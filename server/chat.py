"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from .answers import Envelope, ignored_header, refusals_counted, stream_of
from .body import read_json_object
from .errors import client_left
from .generation import Finished, Generation, Job, collect
from .limits import Ticket
from .logprobs import LogprobFormat
from .preparation import prepare_chat, response_id
from .protocol import ChatBody, validate
from .state import ServerState, state_of
from .streaming import run_until_disconnect

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    with refusals_counted(state):
        fields = await read_json_object(request)
        body, ignored = validate(ChatBody, fields, strict=state.settings.strict)
        state.check_model(body.model)
        answer_id = response_id("chatcmpl", request, body)
        chat = await Chat.start(state, body, answer_id, request.state.request_id)
    headers = ignored_header(ignored)
    job, ticket = chat.job, chat.ticket
    if body.stream:
        return stream_of(request, chat.events(), chat.failure, ticket, job.deadline, headers)
    with ticket:
        answers = await run_until_disconnect(
            request.receive, collect(chat.generation, job.n), job.deadline
        )
    if answers is None:
        return client_left()
    return JSONResponse(chat.whole(answers[0]), headers=headers)


class Chat:
    """One admitted conversation and its answer: whole, in events, or in `choices`, on top of which
    the other APIs of conversations are written."""

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
        self._body = body
        self._envelope = Envelope(state, answer_id, kind, body, self.generation)
        self._logprobs = LogprobFormat(
            state.tokenizer, as_ids=bool(body.return_tokens_as_token_ids)
        )

    @classmethod
    async def start(cls, state: ServerState, body: ChatBody, answer_id: str, log_id: str) -> Chat:
        """Raises QuireError where the conversation is refused. Whoever runs it closes `ticket`."""
        job, ticket = await prepare_chat(state, body)
        return cls(state, body, job, ticket, answer_id, log_id)

    def whole(self, answers: list[Finished]) -> dict[str, Any]:
        """The answer in one piece."""
        body = self._body
        answer = self._envelope.whole(
            [self._choice(index, finished) for index, finished in enumerate(answers)]
        )
        if body.prompt_logprobs is not None:
            entries = self.generation.prompt_logprobs[0] or ()
            answer["prompt_logprobs"] = self._logprobs.prompt(entries)
        if body.return_token_ids:
            answer["prompt_token_ids"] = list(self.generation.prompt_token_ids(0))
        return answer

    def _choice(self, index: int, finished: Finished) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": finished.text, "refusal": None},
            "logprobs": None,
            "finish_reason": finished.finish_reason,
            "stop_reason": finished.stop_reason,
        }
        if self._body.logprobs:
            choice["logprobs"] = self._logprobs.chat(
                finished.logprobs, self._body.top_logprobs or 0
            )
        if self._body.return_token_ids:
            choice["token_ids"] = finished.token_ids
        return choice

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The chunks of a stream, but for its end."""
        envelope = self._envelope
        async with aclosing(self.choices()) as choices:
            async for choice in choices:
                yield envelope.chunk(choice)
        if envelope.include_usage:
            yield envelope.usage_chunk()

    async def choices(self) -> AsyncGenerator[dict[str, Any], None]:
        """What stands in `choices` of a stream's chunks. Each choice begins with its role and
        ends with a finish_reason. Raises QuireError."""
        body = self._body
        begun = False
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                if not begun:
                    begun = True
                    for index in range(self.job.n):
                        yield self._role_choice(index)
                choice: dict[str, Any] = {
                    "index": delta.choice,
                    "delta": {"content": delta.text} if delta.text else {},
                    "logprobs": None,
                    "finish_reason": delta.finish_reason,
                    "stop_reason": delta.stop_reason,
                }
                if body.logprobs:
                    choice["logprobs"] = self._logprobs.chat(delta.logprobs, body.top_logprobs or 0)
                if body.return_token_ids:
                    choice["token_ids"] = delta.token_ids
                yield choice

    def _role_choice(self, index: int) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = list(self.generation.prompt_token_ids(0))
        return choice

    def failure(self) -> list[bytes]:
        """Terminal chunks of the choices that had none."""
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
