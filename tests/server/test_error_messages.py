"""What errors say: words for the sender of the body, the field by its path there, and a code."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import httpx
import pytest
from pydantic import BaseModel, Field, ValidationError

from quire.server.requests.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from quire.server.validation import MAX_LISTED, explain

from .conftest import MakeClient
from .fakes import FakeEngineClient
from .openai_http import CHAT, COMPLETIONS, HI, PROMPT, assert_error

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
COUNT = "/v1/messages/count_tokens"
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
LONG = [{"role": "user", "content": "y" * 600}]
NO_INTEGER, NO_NUMBER, NO_BOOLEAN = (
    "must be an integer",
    "must be a number",
    "must be true or false",
)
NAME = "must have 1 to 128 letters, digits or _ . : / -"
PROMPT_FORMS = "must be a string, a list of strings, of token ids, or of lists of token ids"
CONTEXT = "This model's maximum context length is 512 tokens, but "


class Bad(NamedTuple):
    """A body, and the error's message and param. A message without `:` is the whole message, and
    one that begins with it follows the param."""

    path: str
    fields: dict[str, Any]
    param: str
    message: str
    code: str = "invalid_value"


def chat_tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


def calls(*tool_calls: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": [*tool_calls]}]}


def says(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


TOO_LONG = "context_length_exceeded"
BAD = [
    # types
    Bad(CHAT, {"temperature": "hot"}, "temperature", f": {NO_NUMBER}"),
    Bad(CHAT, {"max_tokens": 1.5}, "max_tokens", f": {NO_INTEGER}"),
    Bad(CHAT, {"seed": "7"}, "seed", f": {NO_INTEGER}"),
    Bad(CHAT, {"stream": 1}, "stream", f": {NO_BOOLEAN}"),
    Bad(CHAT, {"logprobs": 2}, "logprobs", f": {NO_BOOLEAN}"),
    Bad(COMPLETIONS, {"logprobs": True}, "logprobs", f": {NO_INTEGER}"),
    Bad(CHAT, {"chat_template_kwargs": []}, "chat_template_kwargs", ": must be an object"),
    Bad(CHAT, {"documents": {}}, "documents", ": must be a list"),
    Bad(CHAT, {"response_format": "json"}, "response_format", ": must be an object"),
    Bad(CHAT, {"stream": True, "stream_options": {"include_usage": "yes"}},
        "stream_options.include_usage", f": {NO_BOOLEAN}"),
    Bad(CHAT, {"logit_bias": {"7": "x"}}, "logit_bias.7", f": {NO_NUMBER}"),
    Bad(COMPLETIONS, {"stop_token_ids": ["a", "b"]}, "stop_token_ids[0]", f": {NO_INTEGER}"),
    # choices and bounds
    Bad(CHAT, {"reasoning_effort": "vast"}, "reasoning_effort",
        ": must be 'none', 'minimal', 'low', 'medium', 'high' or 'xhigh'"),
    Bad(CHAT, {"early_stopping": "x"}, "early_stopping", ': must be true, false or "never"'),
    Bad(CHAT, {"thinking_token_budget": -1}, "thinking_token_budget", ": must be at least 0"),
    Bad(COMPLETIONS, {"thinking_token_budget": 1}, "thinking_token_budget",
        ": is not available in completions, only in chats"),
    Bad(CHAT, {"priority": 2**40}, "priority", ": must be below 2147483648"),
    Bad(CHAT, {"timeout": 0}, "timeout", ": must be above 0"),
    Bad(CHAT, {"user": "x" * 129}, "user", ": must have at most 128 characters"),
    Bad(CHAT, {"cache_salt": ""}, "cache_salt", ": must not be empty"),
    Bad(CHAT, {"temperature": 9}, "temperature", "temperature must be from 0 to 2"),
    Bad(CHAT, {"top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs"),
    Bad(CHAT, {"stop": [""]}, "stop", ": each string must have 1 to 1024 characters"),
    # prompts and messages
    *(Bad(COMPLETIONS, {"prompt": value}, "prompt", f": {PROMPT_FORMS}")
      for value in (None, 5, {"a": 1}, [1, "a"])),
    Bad(CHAT, {"messages": "hi"}, "messages", ": must be a list"),
    Bad(CHAT, {"messages": []}, "messages", ": must not be empty"),
    Bad(CHAT, {"messages": ["hi"]}, "messages[0]", ": must be an object"),
    Bad(CHAT, {"messages": [{"content": "hi"}]}, "messages[0].role", ": is missing"),
    Bad(CHAT, {"messages": [USER, {"role": "bot", "content": "x"}]}, "messages[1].role",
        ": must be 'system', 'developer', 'user', 'assistant', 'tool' or 'function'"),
    Bad(CHAT, says(5), "messages[0].content", ": must be a string or a list of content parts"),
    Bad(CHAT, says([{"text": "a"}, {"type": "image_url"}]), "messages[0].content",
        ": part 1 has the type 'image_url'; only text is read"),
    Bad(CHAT, says([{"type": "text"}]), "messages[0].content",
        ": part 0 needs a string as its text"),
    # tools
    Bad(CHAT, {"tools": [{"type": "web"}]}, "tools[0].type",
        ": must be 'function' or 'custom'"),
    Bad(CHAT, {"tools": [{"type": "function", "name": "f"}]}, "tools[0].function",
        ": is missing"),
    Bad(CHAT, {"tools": [TOOL, {"function": {}}]}, "tools[1].function.name", ": is missing"),
    Bad(CHAT, chat_tool(name="a b"), "tools[0].function.name", f": {NAME}"),
    Bad(CHAT, chat_tool(parameters=[]), "tools[0].function.parameters",
        ': must be the JSON schema of an object, {"type": "object", …}'),
    Bad(CHAT, {"tools": [TOOL, TOOL]}, "tools", ": two tools have the name 'f'"),
    Bad(CHAT, {"tool_choice": "required"}, "tool_choice",
        "tool_choice is required, but there are no tools"),
    Bad(CHAT, calls({"function": {"name": "f"}}), "messages[1].tool_calls[0].id", ": is missing"),
    Bad(CHAT, calls({"id": "1"}), "messages[1].tool_calls[0].function", ": is missing"),
    Bad(CHAT, calls({"id": "1", "type": "custom"}), "messages[1].tool_calls[0].custom",
        ": is missing"),
    Bad(CHAT, calls({"id": "1", "function": {"name": "f", "arguments": {}}}),
        "messages[1].tool_calls[0].function.arguments", ": must be a string"),
    # several fields at once
    Bad(CHAT, {"stream": 1, "temperature": "hot", "n": "2"}, "stream",
        f"stream: {NO_BOOLEAN}; n: {NO_INTEGER}; temperature: {NO_NUMBER}"),
    Bad(CHAT, {"logits_processors": ["x"], "audio": {}}, "logits_processors",
        "logits_processors, audio are not supported by this server"),
    Bad(CHAT, {"modalities": ["audio"]}, "modalities",
        "modalities is not supported by this server"),
    # other endpoints
    Bad("/tokenize", {"prompt": 5}, "prompt", ": must be a string"),
    Bad("/detokenize", {"tokens": ["a"]}, "tokens[0]", f": {NO_INTEGER}"),
    Bad(RESPONSES, {"input": "x", "temperature": "hot"}, "temperature", f": {NO_NUMBER}"),
    Bad(RESPONSES, {"input": "x", "tools": [{"type": "function", "name": "a b"}]},
        "tools[0].name", f": {NAME}"),
    # the context
    Bad(COMPLETIONS, {"prompt": "p" * 600}, "prompt",
        CONTEXT + "your prompt came to 600 tokens, so there is no room for an answer. "
        "Shorten the prompt.", TOO_LONG),
    Bad(CHAT, {"messages": LONG}, "messages",
        CONTEXT + "your messages came to 619 tokens, so there is no room for an answer. "
        "Shorten the messages.", TOO_LONG),
    Bad(RESPONSES, {"input": "y" * 600}, "input",
        CONTEXT + "your input came to 619 tokens, so there is no room for an answer. "
        "Shorten the input.", TOO_LONG),
    Bad(CHAT, {"messages": LONG, "max_tokens": 9}, "messages",
        CONTEXT + "your messages came to 619 tokens, so there is no room for an answer. "
        "Shorten the messages.", TOO_LONG),
    *(Bad(CHAT, {name: 600}, name,
          CONTEXT + f"{name} asks for 600 tokens after a prompt of 21. Shorten the prompt or lower "
          f"{name}.", TOO_LONG) for name in ("max_tokens", "max_completion_tokens")),
    Bad(CHAT, {"messages": [{"role": "user", "content": "z" * 10_000}]}, "messages",
        "This model's maximum context length is 512 tokens, which the 10000 characters of your "
        "messages cannot fit. Shorten the messages.", TOO_LONG),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.path}-{bad.param}")
async def test_an_error_names_the_field_and_says_what_it_must_be(
    client: httpx.AsyncClient, engine: FakeEngineClient, bad: Bad
) -> None:
    base = {CHAT: HI, COMPLETIONS: PROMPT}.get(bad.path, {})
    response = await client.post(bad.path, json={**base, **bad.fields})
    assert_error(response, 400, bad.code, bad.param)
    expected = bad.param + bad.message if bad.message.startswith(":") else bad.message
    assert response.json()["error"]["message"] == expected
    assert not engine.requests


async def test_anthropics_clients_are_told_in_their_words(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    for path, fields in ((MESSAGES, {"max_tokens": 5}), (COUNT, {})):
        for content, message in (
            ("y" * 600, "prompt is too long: 619 tokens > 512 maximum"),
            ("y" * 10_000, "prompt is too long: This model's maximum context length is 512"),
        ):
            body = {"messages": [{"role": "user", "content": content}], **fields}
            response = await client.post(path, json=body)
            if path == COUNT and len(content) == 600:
                assert response.json() == {"input_tokens": 619}
                continue
            assert response.status_code == 400
            error = response.json()
            assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
            assert error["error"]["message"].startswith(message)
    assert not engine.requests


async def test_other_dialects_reduce_max_tokens_to_the_room_that_is_left(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    client = make_client()
    for path, name, fields in (
        (RESPONSES, "max_output_tokens", {"input": "hi"}),
        (MESSAGES, "max_tokens", {"messages": [USER]}),
    ):
        response = await client.post(path, json={**fields, name: 9999})
        assert response.status_code == 200, response.text
        assert response.headers["x-quire-ignored-params"] == name
        request = engine.requests[-1]
        assert request.sampling_params.max_tokens == 512 - len(request.prompt_token_ids)
        response = await client.post(path, json={**fields, name: 9})
        assert "x-quire-ignored-params" not in response.headers


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/v1/responses/resp_x", 404, "there is no response 'resp_x'"),
        ("/v1/responses/resp_x/input_items", 404, "there is no response 'resp_x'"),
        ("/v1/conversations/x", 404, "there is no conversation 'x'"),
        ("/v1/conversations/x/items/y", 404, "there is no conversation 'x'"),
        ("/web/x/y.js", 404, "the page has no such file in this version"),
        ("/v1/respons/x", 404, "there is no '/v1/respons/x'; did you mean /v1/responses?"),
        ("/v1/responses/x/input_items?limit=0", 400, "limit: must be at least 1"),
        ("/v1/responses/x/input_items?limit=x", 400, "limit: must be an integer"),
        ("/v1/responses/x/input_items?order=up", 400, "order: must be 'asc' or 'desc'"),
        ("/debug/live?limit=x", 400, "limit: must be an integer"),
    ],
)
async def test_a_wrong_address_is_told_by_what_is_wrong_with_it(
    make_client: MakeClient, path: str, status: int, message: str
) -> None:
    """A thing that is not there differs from a path that is not."""
    response = await make_client().get(path)
    assert (response.status_code, response.json()["error"]["message"]) == (status, message)


class Pet(BaseModel):
    name: str
    age: int = Field(ge=0)


class Owner(BaseModel):
    pets: dict[str, Pet | list[Pet]] | None = None
    house: int | bool | list[int] = 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"house": "x"}, "house: must be an integer or be true or false or be a list"),
        ({"house": [1, "x"]}, "house: must be an integer or be true or false; house[1]: must be"),
        ({"pets": {"rex": {"name": 1}}}, "pets.rex.name: must be a string; pets.rex.age: is"),
        ({"pets": {"a b": {"name": "x", "age": -1}}}, "pets.?.age: must be at least 0"),
    ],
)
def test_branches_of_a_union_are_no_part_of_the_path(fields: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Owner.model_validate(fields, strict=True)
    said, param = explain(caught.value, fields)
    assert said.startswith(message)
    assert param == re.split(": |;", message)[0]


def test_only_so_many_fields_are_listed() -> None:
    fields = {str(number): {"name": 1, "age": 1} for number in range(MAX_LISTED + 5)}
    with pytest.raises(ValidationError) as caught:
        Owner.model_validate({"pets": fields}, strict=True)
    said, _ = explain(caught.value, {"pets": fields})
    assert said.count("must be") == MAX_LISTED and re.search(r"; and [1-9]\d* more$", said)


@pytest.mark.parametrize("model", [ChatBody, CompletionBody, TokenizeBody, DetokenizeBody])
def test_no_words_of_the_validator_reach_a_client(model: type[BaseModel]) -> None:
    """Every field gets values of every type; the messages speak of none of pydantic's terms."""
    values: list[Any] = [None, True, 1, -5, 1.5, "", "x", [], [1], ["x"], [[]], [{}], {}, {"a": 1}]
    terms = re.compile(
        r"Input|valid |\bdict\b|instance|function-|coerce|\bList\b|type=|Value error|bool"
    )
    for name in model.model_fields:
        for value in values:
            try:
                model.model_validate({name: value})
            except ValidationError as error:
                said, param = explain(error, {name: value})
                assert not terms.search(said), said
                assert re.split(r"[.\[]", param)[0] in model.model_fields
