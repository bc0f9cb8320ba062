"""POST /v1/classify: the probability of each class of a text, as vLLM answers it."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...engine.errors import InvalidRequestError
from ..api.answers import ignored_header, refusals_counted
from ..api.embeddings import tokens_to_keep
from ..api.translation import renamed
from ..api.whole_answers import json_of
from ..errors import client_left
from ..http.body import read_json_object
from ..http.route_docs import GENERATION_ERRORS, OBJECTS, answers, errors, json_body, json_object
from ..requests.chat_prompt import check_chat, encode_chat
from ..requests.field_types import Prompt
from ..requests.preparation import prompts_of
from ..requests.protocol import ChatFields, TokenizeChatBody, check_types
from ..requests.state import ServerState, state_of
from .scores import Encode, ScoringFields, classifier_of, score

router = APIRouter(tags=["rerank, score, classify"])


class ClassifyBody(ScoringFields):
    """The body of /v1/classify: `input`, or `messages` that the chat template renders."""

    input: Prompt = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None


@router.post("/classify", response_model=None, include_in_schema=False)
@router.post(
    "/v1/classify",
    response_model=None,
    openapi_extra=json_body(ClassifyBody),
    responses={
        **answers(json_object("id", "object", "model", "usage", "data", data=OBJECTS)),
        **errors(*GENERATION_ERRORS),
    },
)
async def classify(request: Request) -> Response:
    """Return the probability of each class for each text."""
    state = state_of(request)
    with refusals_counted(state.metrics):
        fields = await read_json_object(request)
        body, ignored = check_types(ClassifyBody, fields, strict=state.settings.strict)
        state.check_model(body.model)
        labels = classifier_of(state).labels
        if (body.input is None) == (body.messages is None):
            raise InvalidRequestError("input: give either input or messages", "input")
        encoders, characters = _encoders(state, body)
        param = "input" if body.messages is None else "messages"
        scored = await score(request, body, encoders, num_characters=characters, param=param)
    if scored is None:
        return client_left()
    data = [
        {
            "index": index,
            "label": labels[int(row.argmax())],
            "probs": row.tolist(),
            "num_classes": len(labels),
        }
        for index, row in enumerate(scored.scores)
    ]
    answer = {
        "id": f"classify-{request.state.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": state.name_of(body.model),
        "data": data,
        "usage": scored.usage,
    }
    return await json_of(answer, ignored_header(ignored))


def _encoders(state: ServerState, body: ClassifyBody) -> tuple[list[Encode], int]:
    """Return the encoders of the body's texts, and how many characters they have in total."""
    limit = state.engine.info.max_model_len
    keep = tokens_to_keep(body.truncate_prompt_tokens, limit)
    if body.messages is not None:
        if keep is not None:
            raise InvalidRequestError("messages cannot be truncated", "truncate_prompt_tokens")
        chat_fields = {"messages": body.messages, "add_generation_prompt": False}
        chat, _ = check_types(TokenizeChatBody, chat_fields, strict=state.settings.strict)
        check_chat(state, chat)
        characters = sum(len(message.content or "") for message in chat.messages)
        return [partial(_encode_chat, state, chat, body.add_special_tokens, limit)], characters
    with renamed({"prompt": "input"}):
        texts = prompts_of(body.input, state.settings.max_prompts_per_request)
    encoders: list[Encode] = [partial(_encode, state, body, text, limit, keep) for text in texts]
    return encoders, sum(map(len, texts))


async def _encode_chat(
    state: ServerState, chat: ChatFields, add_special_tokens: bool | None, limit: int
) -> list[int]:
    prompt = await encode_chat(state, chat, add_special_tokens, limit)
    return prompt.token_ids


async def _encode(
    state: ServerState,
    body: ClassifyBody,
    text: str | list[int],
    limit: int,
    keep: int | None,
) -> list[int]:
    """Tokenise one text; token ids only lose their end."""
    if not isinstance(text, str):
        return text[:keep]
    return await state.tokenizer.encode(
        text,
        add_special_tokens=body.add_special_tokens is not False,
        max_tokens=limit,
        keep=keep,
    )
