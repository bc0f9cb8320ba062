"""One request, however large, leaves the event loop to the others."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from quire.engine.outputs import TokenLogprobs
from quire.engine.request import Request
from quire.server.text.tokenizer import Tokenizer

from .conftest import MODEL, app_client, make_app
from .fakes import FakeEngineClient, byte_tokenizer
from .openai_http import CHAT, COMPLETIONS, HI

MOST_SECONDS = 0.06
"""CPU time that the event loop may spend on one thing. Its own, so that other processes do not
count. Before they were mended, these requests took 0.13 to 2.9 s."""


def tools(count: int) -> list[dict[str, Any]]:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    return [
        {"type": "function", "function": {"name": f"tool_{number}", "parameters": schema}}
        for number in range(count)
    ]


class Engine(FakeEngineClient):
    """An engine for long prompts, which does not make their log-probabilities while it is timed."""

    made: list[TokenLogprobs | None]

    def _prompt_logprobs(
        self, request: Request, choice: int, number: int
    ) -> list[TokenLogprobs | None] | None:
        if request.sampling_params.prompt_logprobs is None or choice or number:
            return None
        return self.made[: len(request.prompt_token_ids)]


@pytest.fixture(scope="module")
def many_controls() -> Tokenizer:
    """Make a tokenizer with a thousand control tokens, as gpt-oss's and DeepSeek's have."""
    return byte_tokenizer(special=[f"<|reserved_{number}|>" for number in range(1000)])


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Keep Python from collecting garbage: the server has told it to look at little."""
    gc.disable()
    yield
    gc.enable()


LONG = [5] * 40_000
BLOCK = {"type": "text", "text": "a"}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "choices": (CHAT, {**HI, "n": 128}),
    "choices with tools": (CHAT, {**HI, "n": 128, "tools": tools(500), "stream": True}),
    "forced calls": (CHAT, {**HI, "tool_choice": "required", "tools": tools(150)}),
    "token ids of the prompt": (
        COMPLETIONS,
        {"prompt": LONG, "n": 128, "return_token_ids": True},
    ),
    "echo": (COMPLETIONS, {"prompt": LONG, "echo": True, "logprobs": 5}),
    "streamed echo": (COMPLETIONS, {"prompt": LONG, "echo": True, "logprobs": 5, "stream": True}),
    "blocks": ("/v1/messages", {"messages": [{"role": "user", "content": [BLOCK] * 20_000}]}),
    "items": ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 4000}),
    "spellings": ("/tokenize", {"prompt": "ab " * 60_000, "return_token_strs": True}),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_large_request_does_not_hold_the_event_loop(
    many_controls: Tokenizer, no_collection: None, name: str
) -> None:
    engine = Engine(max_model_len=1_000_000, num_blocks=200_000, max_num_seqs=256)
    entry = TokenLogprobs(5, -0.5, 1, [5, 6, 7, 8, 9], [-0.5, -1.0, -2.0, -3.0, -4.0])
    engine.made = [None, *[entry] * len(LONG)]
    app = make_app(engine, many_controls, max_n=128)
    path, fields = REQUESTS[name]
    limit = {} if path == "/tokenize" else {"max_tokens": 2}
    if path == "/v1/responses":
        limit = {"max_output_tokens": 2}
    content = json.dumps({"model": MODEL, **limit, **fields}).encode()
    longest, ended = 0.0, False

    async def watch() -> None:
        nonlocal longest
        while not ended:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            longest = max(longest, time.thread_time() - before)

    async with app_client(app) as client:
        assert (await client.post(CHAT, json={**HI, "max_tokens": 2})).status_code == 200
        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.01)
        headers = {"content-type": "application/json"}
        response = await client.post(path, content=content, headers=headers)
        ended = True
        await watching
    app.state.quire.grammar_check.close()
    assert response.status_code == 200, response.text[:300]
    assert longest < MOST_SECONDS
