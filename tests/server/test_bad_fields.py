"""Bad values of fields: each is answered with 400, and `param` names the field."""

from __future__ import annotations

from typing import Any, NamedTuple

import httpx
import pytest

from .fakes import FakeEngineClient
from .openai_http import CHAT, COMPLETIONS, HI, PROMPT, assert_error

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


class Bad(NamedTuple):
    """Fields that are answered with 400, and the error's param and code."""

    path: str
    fields: dict[str, Any]
    param: str
    code: str = "invalid_value"


BAD = [
    # numbers of choices
    *(Bad(path, {name: n}, name) for path in (COMPLETIONS, CHAT)
      for name in ("n", "best_of") for n in (0, -1, 10**9)),
    Bad(COMPLETIONS, {"prompt": ["p"] * 100, "n": 60}, "n"),
    Bad(COMPLETIONS, {"n": 2, "best_of": 1}, "best_of"),
    Bad(COMPLETIONS, {"n": 1, "best_of": 2, "stream": True}, "best_of"),
    # strict types
    *(Bad(COMPLETIONS, {name: value}, name) for name in ("n", "max_tokens", "top_k", "seed")
      for value in (True, "3", 1.5)),
    *(Bad(CHAT, {name: value}, name) for name in ("stream", "logprobs")
      for value in (1, "true")),
    # sampling parameters
    *(Bad(COMPLETIONS, {"temperature": value}, "temperature")
      for value in (-1, 2.5, "1", True)),
    Bad(COMPLETIONS, {"top_p": 0}, "top_p"),
    Bad(COMPLETIONS, {"top_p": 1.1}, "top_p"),
    Bad(COMPLETIONS, {"top_k": -5}, "top_k"),
    Bad(COMPLETIONS, {"min_p": 2}, "min_p"),
    # lengths
    *(Bad(COMPLETIONS, {"max_tokens": value}, "max_tokens") for value in (0, -1)),
    *(Bad(CHAT, {"max_completion_tokens": value}, "max_completion_tokens")
      for value in (0, -1)),
    Bad(COMPLETIONS, {"max_tokens": 2**63}, "max_tokens", "context_length_exceeded"),
    Bad(COMPLETIONS, {"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    # the context
    Bad(COMPLETIONS, {"max_tokens": 512}, "max_tokens", "context_length_exceeded"),
    Bad(CHAT, {"max_completion_tokens": 512}, "max_completion_tokens",
        "context_length_exceeded"),
    Bad(COMPLETIONS, {"prompt": "p" * 512}, "prompt", "context_length_exceeded"),
    Bad(COMPLETIONS, {"prompt": [1] * 600}, "prompt", "context_length_exceeded"),
    # log-probabilities
    *(Bad(CHAT, {"logprobs": True, "top_logprobs": value}, "top_logprobs")
      for value in (21, 10**9, -1)),
    Bad(CHAT, {"top_logprobs": 1}, "top_logprobs"),
    *(Bad(COMPLETIONS, {"logprobs": value}, "logprobs") for value in (21, -1)),
    Bad(COMPLETIONS, {"prompt_logprobs": 21}, "prompt_logprobs"),
    Bad(COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    # token ids, biases, stops and words
    *(Bad(COMPLETIONS, {"logit_bias": value}, "logit_bias")
      for value in ({"258": 1}, {"-1": 1}, {"x": 1}, {"5": 101}, {"²": 1})),
    *(Bad(COMPLETIONS, {"stop": value}, "stop")
      for value in (["a"] * 17, "", ["a", ""], "x" * 2**20, [1], 3)),
    *(Bad(COMPLETIONS, {"stop_token_ids": value}, "stop_token_ids")
      for value in ([258], [-1], [1] * 1000)),
    Bad(COMPLETIONS, {"stop_token_ids": ["x"] * 200_000}, "stop_token_ids[0]"),
    Bad(COMPLETIONS, {"logit_bias": dict.fromkeys(map(str, range(40_000)), "x")},
        "logit_bias"),
    Bad(CHAT, {"messages": [3] * 100_000}, "messages[0]"),
    Bad(CHAT, {"messages": HI["messages"] * 4097}, "messages"),
    *(Bad(COMPLETIONS, {"bad_words": value}, "bad_words")
      for value in ("x", [""], [" "], [1], ["x"] * 129, ["x" * 257], ["\u20ac" * 100])),
    Bad(COMPLETIONS, {"allowed_token_ids": []}, "allowed_token_ids"),
    # seeds and penalties
    *(Bad(COMPLETIONS, {"seed": value}, "seed") for value in (2**64, -(2**64))),
    Bad(COMPLETIONS, {"presence_penalty": 3}, "presence_penalty"),
    Bad(COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty"),
    # fields that are not supported, at this endpoint or in this combination
    *(Bad(CHAT, {name: value}, name) for name, value in {
        "tool_choice": "required", "reasoning_effort": "huge", "suffix": "x",
        "logits_processors": ["x"], "modalities": ["audio"],
    }.items()),
    Bad(CHAT, {"response_format": {"type": "yaml"}}, "response_format.type"),
    Bad(CHAT, {"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    Bad(COMPLETIONS, {"suffix": "x"}, "suffix"),
    Bad(COMPLETIONS, {"suffix": 1}, "suffix"),
    *(Bad(path, {"length_penalty": 2}, "length_penalty") for path in (COMPLETIONS, CHAT)),
    Bad(COMPLETIONS, {"early_stopping": True}, "early_stopping"),
    *(Bad(path, {"use_beam_search": True, **fields}, next(iter(fields)))
      for path in (COMPLETIONS, CHAT)
      for fields in (
        {"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"stop": "x"},
        {"presence_penalty": 1}, {"repetition_penalty": 1.1}, {"frequency_penalty": 1},
        {"logit_bias": {"1": 1}}, {"allowed_token_ids": [1]}, {"bad_words": ["x"]},
        {"length_penalty": 11}, {"early_stopping": "always"}, {"n": 65},
    )),
    Bad(COMPLETIONS, {"use_beam_search": True, "stream": True}, "use_beam_search"),
    Bad(COMPLETIONS, {"use_beam_search": True, "echo": True, "max_tokens": 0}, "max_tokens"),
    Bad(COMPLETIONS, {"use_beam_search": True, "response_format": {"type": "json_object"}},
        "use_beam_search"),
    # empty prompts
    *(Bad(COMPLETIONS, {"prompt": value}, "prompt")
      for value in ("", [], [""], [[]], ["a", ""])),
    Bad(CHAT, {"messages": []}, "messages"),
    # token ids as prompts
    *(Bad(COMPLETIONS, {"prompt": value}, "prompt")
      for value in ([-1], [258], [2**63], [[1], [300]])),
    *(Bad(COMPLETIONS, {"prompt": value}, "prompt")
      for value in ([1, "a"], [1.5], [True], [[True]], {}, 3, None)),
    # too much at once
    Bad(COMPLETIONS, {"prompt": ["p"] * 10_000}, "prompt"),
    Bad(COMPLETIONS, {"prompt": "a" * 5_000_000}, "prompt", "context_length_exceeded"),
    Bad(CHAT, {"messages": [{"role": "user", "content": "a" * 5_000_000}]}, "messages",
        "context_length_exceeded"),
    # streams
    Bad(COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
    # tools
    Bad(CHAT, {"tools": [{"a": 1}]}, "tools[0].function"),
    Bad(CHAT, {"tools": "f"}, "tools"),
    Bad(CHAT, {"tools": [TOOL] * 1025}, "tools"),
    Bad(CHAT, {"tools": [TOOL, TOOL]}, "tools"),
    *(Bad(CHAT, {"tools": [{"type": "function", "function": {"name": "f", **fields}}]},
          f"tools[0].function.{next(iter(fields))}")
      for fields in ({"name": ""}, {"name": "a b"}, {"name": "x" * 129}, {"parameters": []},
                     {"parameters": {"type": "array"}}, {"parameters": {"properties": []}},
                     {"description": 1}, {"strict": "yes"})),
    *(Bad(CHAT, {"tools": [TOOL], "tool_choice": value}, "tool_choice")
      for value in ("any", 1, {}, {"type": "function"}, {"type": "function", "function": {}},
                    {"type": "function", "function": {"name": "g"}})),
    Bad(CHAT, {"tools": [TOOL], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    Bad(CHAT, {"tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice"),
    # templates
    Bad(CHAT, {"chat_template": "{{ messages }}"}, "chat_template"),
    *(Bad(CHAT, {"chat_template_kwargs": {name: "x"}}, "chat_template_kwargs")
      for name in ("tokenizer", "chat_template", "messages", "padding")),
    # references to external content, which are never fetched, and embeddings
    *(Bad(CHAT, {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}}]}]}, "messages[0].content")
      for url in ("file:///etc/passwd", "http://169.254.169.254/")),
    Bad(COMPLETIONS, {"prompt_embeds": "AAAA"}, "prompt_embeds"),
    Bad(CHAT, {"response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"$ref": "http://example.invalid/"}}}},
        "response_format.json_schema.schema"),
    # the rest
    *(Bad(COMPLETIONS, {"cache_salt": value}, "cache_salt")
      for value in ("", 3, "x" * 2**20)),
    Bad(COMPLETIONS, {"request_id": "a\r\nb"}, "request_id"),
    Bad(COMPLETIONS, {"timeout": 0}, "timeout"),
    Bad(COMPLETIONS, {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    Bad(COMPLETIONS, {"truncation_side": "middle"}, "truncation_side"),
    Bad(COMPLETIONS, {"logprob_token_ids": [7]}, "logprob_token_ids"),
    Bad(COMPLETIONS, {"logprobs": 0, "logprob_token_ids": []}, "logprob_token_ids"),
    Bad(COMPLETIONS, {"logprobs": 0, "logprob_token_ids": [-1]}, "logprob_token_ids"),
    Bad(COMPLETIONS, {"logprobs": 0, "logprob_token_ids": [7] * 129}, "logprob_token_ids"),
    Bad(CHAT, {"logprobs": False, "logprob_token_ids": [7]}, "logprob_token_ids"),
    Bad(CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    Bad(CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    Bad(CHAT, {"continue_final_message": True}, "continue_final_message"),
    Bad(CHAT, {"documents": [{"text": "x"}]}, "documents"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad.fields)[:60])
async def test_bad_fields_are_400_and_never_reach_the_engine(
    client: httpx.AsyncClient, engine: FakeEngineClient, bad: Bad
) -> None:
    fields = {**(PROMPT if bad.path == COMPLETIONS else HI), **bad.fields}
    response = await client.post(bad.path, json=fields)
    assert_error(response, 400, bad.code, bad.param)
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert engine.requests == []
    debug = (await client.get("/debug/engine")).json()
    assert debug["admission"] == {
        "num_queued": 0, "num_running": 0, "queued_tokens": 0, "draining": False
    }  # fmt: skip
