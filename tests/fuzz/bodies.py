"""Valid request bodies, changed at random: wrong types, absurd values, other fields."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a block?"},
]
_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
_TWO: dict[str, Any] = {"max_tokens": 2}
_THREE: dict[str, Any] = {"max_tokens": 3}
BASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "a b c", **_TWO, "temperature": 0.5, "n": 2, "seed": 1}),
    ("/v1/completions", {"prompt": [[5, 6], [8]], "max_tokens": 1, "logprobs": 2, "echo": True}),
    ("/v1/completions", {"prompt": "x", **_TWO, "stream": True, "stop": ["a", "b"]}),
    ("/v1/completions", {"prompt": "x", **_THREE, "structured_outputs": {"regex": "[a-c]+"}}),
    ("/v1/completions", {"prompt": "x", **_TWO, "use_beam_search": True, "n": 2,
                         "temperature": 0, "length_penalty": 1.0}),
    ("/v1/chat/completions", {"messages": _CHAT, **_TWO, "logprobs": True, "top_logprobs": 1}),
    ("/v1/chat/completions", {"messages": _CHAT, **_TWO, "stream": True,
                              "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {"messages": _CHAT, **_THREE,
                              "response_format": {"type": "json_object"}}),
    ("/v1/chat/completions", {"messages": _CHAT, **_THREE, "tools": [_TOOL],
                              "tool_choice": "auto", "logit_bias": {"5": 3}}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 16, "store": False}),
    ("/v1/responses/input_tokens", {"input": [{"role": "user", "content": "a"}]}),
    ("/v1/messages", {"messages": [_CHAT[1]], **_TWO, "system": "s", "top_k": 3}),
    ("/v1/messages/count_tokens", {"messages": [_CHAT[1]]}),
    ("/v1/embeddings", {"input": ["a", "b"]}),
    ("/v1/rerank", {"query": "a", "documents": ["a", "b"]}),
    ("/v1/score", {"text_1": "a", "text_2": ["b"]}),
    ("/v1/classify", {"input": "a"}),
    ("/tokenize", {"prompt": "a b"}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/v1/conversations", {"items": [{"role": "user", "content": "a"}]}),
)  # fmt: skip
"""Paths and bodies that are served, or rightly refused, by a small model."""
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, 2**31, 2**63, -(2**63), 10**30, "", "a", "\0",
    "\ud7ff", "🎉" * 5, "a" * 300, "../etc", "http://127.0.0.1:9/", [], [[]], {}, {"a": {}}, [None],
    [1, "a"], ["a"] * 20, [0] * 40, [-1], [10**9], {"type": "json_schema"}, {"type": []},
    {"type": "function"}, {"regex": "("}, {"regex": "(a{1,9}){1,9}"}, {"json": {"$ref": "#"}},
    {"choice": []}, {"grammar": "root ::="}, "auto", "none", "required", "json_object", "user",
)  # fmt: skip


def mutate(rng: random.Random, body: Any, names: list[str]) -> Any:
    """Return a copy of a body with up to three changes; `names` are fields that may be added."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        where, key = _place(rng, body)
        if where is None:
            return _value(rng)
        change = rng.random()
        if change < 0.15:
            del where[key]
        elif change < 0.55:
            where[key] = _value(rng)
        elif change < 0.65:
            where[key] = [copy.deepcopy(where[key]) for _ in range(rng.choice([1, 2, 5]))]
        elif change < 0.7:
            where[key] = {rng.choice(names): where[key]}
        elif isinstance(body, dict):
            body[rng.choice(names)] = _value(rng)
    if isinstance(body, dict):
        body.pop("timeout", None)  # a short one is rightly answered with 504
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(body.get(name), int) and body[name] > 16:
                body[name] = rng.choice([16, 2**63])
        if not {"max_tokens", "max_completion_tokens", "max_output_tokens"} & body.keys():
            body["max_tokens"] = 2
    return body


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(VALUES))


def _place(rng: random.Random, body: Any) -> tuple[Any, Any]:
    """Choose a place in a body: a dict or a list, and a key of it. None if the body has none."""
    where, key = None, None
    while isinstance(body, dict | list) and body:
        where, key = body, rng.choice(list(body) if isinstance(body, dict) else range(len(body)))
        if rng.random() < 0.5:
            break
        body = body[key]
    return where, key


def encode(rng: random.Random, body: Any) -> bytes:
    """Return the body as JSON; now and then with bytes changed, cut or doubled."""
    data = bytearray(json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "replace"))
    if rng.random() < 0.05 and data:
        place = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place:]
            case _:
                data[place:place] = data[: rng.randrange(50)]
    return bytes(data)
