"""POST /tokenize and /detokenize, GET /tokenizer_info: the tokenizer of the other endpoints."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...engine.errors import InvalidRequestError
from ..http.body import read_json_object
from ..http.route_docs import (
    BODY_ERRORS,
    INTEGERS,
    STRING,
    answers,
    errors,
    json_body,
    json_object,
)
from ..requests.chat_prompt import check_chat, encode_chat, settings_without_effect
from ..requests.protocol import DetokenizeBody, TokenizeBody, TokenizeChatBody, validate
from ..requests.state import state_of
from .answers import ignored_header
from .whole_answers import LARGE, in_thread_if, json_of

router = APIRouter(tags=["tokenizer"])

_TOKENS = json_object("count", "max_model_len", "tokens", "token_strs", tokens=INTEGERS)


@router.post(
    "/tokenize",
    response_model=None,
    openapi_extra=json_body(TokenizeBody, TokenizeChatBody),
    responses={**answers(_TOKENS), **errors(*BODY_ERRORS)},
)
async def tokenize(request: Request) -> Response:
    """Return the token ids of a `prompt`, or of `messages` rendered by the chat template."""
    state = state_of(request)
    fields = await read_json_object(request)
    strict, limit = state.settings.strict, state.engine.info.max_model_len
    changes: tuple[str, ...] = ()
    if ("prompt" in fields) == ("messages" in fields):
        raise InvalidRequestError("prompt: give either prompt or messages", "prompt")
    if "prompt" in fields:
        text, ignored = validate(TokenizeBody, fields, strict=strict)
        state.check_model(text.model)
        return_strings = text.return_token_strs
        token_ids = await state.tokenizer.encode(
            text.prompt, add_special_tokens=text.add_special_tokens is not False, max_tokens=limit
        )
    else:
        chat, ignored = validate(TokenizeChatBody, fields, strict=strict)
        state.check_model(chat.model)
        return_strings = chat.return_token_strs
        check_chat(state, chat)
        ignored += await settings_without_effect(state, chat)
        token_ids, changes, unread = await encode_chat(state, chat, chat.add_special_tokens, limit)
        ignored += unread
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": limit,
        "tokens": token_ids,
        "token_strs": None,
    }
    if return_strings:
        # As the vocabulary spells them, with Ġ or ▁ for a space: so do transformers and vLLM.
        spell = state.tokenizer.backend.id_to_token
        answer["token_strs"] = await in_thread_if(
            len(token_ids) > LARGE, lambda: list(map(spell, token_ids))
        )
    return await json_of(answer, ignored_header(ignored, changes))


@router.post(
    "/detokenize",
    response_model=None,
    openapi_extra=json_body(DetokenizeBody),
    responses={**answers(json_object("prompt", prompt=STRING)), **errors(*BODY_ERRORS)},
)
async def detokenize(request: Request) -> Response:
    """Return the text of token ids, including control tokens unless asked otherwise."""
    state = state_of(request)
    fields = await read_json_object(request)
    body, ignored = validate(DetokenizeBody, fields, strict=state.settings.strict)
    state.check_model(body.model)
    vocab_size = state.engine.info.vocab_size
    if body.tokens and not (min(body.tokens) >= 0 and max(body.tokens) < vocab_size):
        raise InvalidRequestError(
            f"tokens: an id is outside the vocabulary of {vocab_size}", "tokens"
        )
    text = await state.tokenizer.decode(
        body.tokens, skip_special_tokens=bool(body.skip_special_tokens)
    )
    return await json_of({"prompt": text}, ignored_header(ignored))


@router.get("/tokenizer_info", responses=errors(503))
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """Return the tokenizer's class, vocabulary size, chat template and what it reads, and special
    tokens."""
    return state_of(request).tokenizer.info()
