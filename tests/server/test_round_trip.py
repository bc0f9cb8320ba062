"""Whatever quire emits, it accepts back: every answer, sent as history, is answered with 200, and
the prompt holds what was said.

A scripted model reasons, talks and calls tools, with arguments that may be broken, and is cut
anywhere: by max_tokens, by a stop string or by a failure. Its answers come through all three APIs,
whole and streamed, and are sent back as they came and as the vendors' packages write them. The
server is strict, so nothing may be named as without effect either.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from anthropic.types import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage
from openai.types.responses import Response
from pydantic_core import from_json

from quire.engine.outputs import RowError
from quire.server.templates.call_arguments import RAW_ARGUMENTS
from quire.server.text.tokenizer import Tokenizer

from .conftest import MODEL, make_app
from .fakes import REASONING_TEMPLATE, FakeEngineClient, Script, byte_tokenizer, ids, prompt_text

TEXT_TEMPLATE = REASONING_TEMPLATE.replace(
    "{{ call.function | tojson }}", "{{ call.function.name + ': ' + call.function.arguments }}"
)
"""A template that reads arguments as text."""
GO_ON = "Please go on."
STOP = "%STOP%"
SCHEMA = {"type": "object", "properties": {"input": {"type": "string"}}}
Item = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """What the model says, and where it is cut."""

    text: str
    max_tokens: int
    chunk: int
    fails: bool


def _call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


WORDS = st.text(st.sampled_from("ab <>{}\"'\\\n|é🎉"), max_size=12) | st.just(f"so{STOP}far")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=3,
)
OBJECTS = st.dictionaries(st.sampled_from(["input", "command", "x"]), VALUES, max_size=2)
ARGUMENTS = st.one_of(
    OBJECTS.map(lambda value: json.dumps(value, ensure_ascii=False)),
    WORDS.map(lambda text: json.dumps({"input": text})),
    st.just('{"command": ["ls", "-a"], "commands": ["ls"]}'),
    st.sampled_from(
        ['{"a": }', "{", "[1]", '"{}"', "null", '{"input": "\\ud83d"}', '{"input": 3}']
    ),
)
CALLS = st.builds(_call, st.sampled_from(["f", "patch", "space__f", "local_shell"]), ARGUMENTS)
THOUGHTS = WORDS.map(lambda text: f"<think>{text}</think>") | WORDS.map("<think>{}".format)
TEXTS = st.builds(
    lambda begin, rest: begin + "".join(rest),
    st.just("") | THOUGHTS,
    st.lists(WORDS | CALLS, max_size=3),
)
SAID = st.builds(
    Said,
    text=TEXTS,
    max_tokens=st.just(400) | st.integers(1, 60),
    chunk=st.sampled_from([1, 3, 1000]),
    fails=st.sampled_from([False, False, False, True]),
)


class Server:
    """An application with a scripted model, and the requests that the test sends to it."""

    def __init__(self, template: str) -> None:
        self.tokenizer: Tokenizer = byte_tokenizer(template)
        self.reads_text = template is TEXT_TEMPLATE
        self.engine = FakeEngineClient(max_model_len=20_000, num_blocks=4096)
        app = make_app(
            self.engine,
            self.tokenizer,
            strict=True,
            tool_call_parser="hermes",
            reasoning_parser="qwen3",
        )
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://quire")

    def say(self, said: Said) -> None:
        """Make the model say it."""
        error = RowError("step_failed", "why") if said.fails else None
        finish = "error" if said.fails else "stop"
        self.engine.scripts = lambda request, choice: Script(
            ids(said.text), finish=finish, error=error, chunk=said.chunk
        )

    async def ask(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(path, json={"model": MODEL, **body})

    async def check_back(self, path: str, said: list[str], **body: Any) -> dict[str, Any]:
        """Send a history back. It must be accepted whole, and its prompt must hold what was said.

        Returns the answer.
        """
        self.say(Said("Well.", 400, 1, False))
        response = await self.ask(path, **body)
        assert response.status_code == 200, (response.text, body)
        assert "x-quire-ignored-params" not in response.headers, response.headers
        prompt = prompt_text(self.engine, self.tokenizer)
        for text in said:
            assert text in prompt, (text, prompt)
        answer: dict[str, Any] = response.json()
        return answer

    def called(self, name: str, arguments: str) -> list[str]:
        """Return what the prompt must hold of a call with these arguments."""
        if self.reads_text:
            return [f"{name}: {arguments}"]
        try:
            value = json.loads(arguments or "{}")
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no character
        except ValueError:
            value = None
        if not isinstance(value, dict):
            value = {RAW_ARGUMENTS: arguments}
        return [f'"{name}"', json.dumps(value, ensure_ascii=False)]


def _events(response: httpx.Response) -> list[Item]:
    data = [
        line.removeprefix("data: ") for line in response.text.split("\n") if line[:5] == "data:"
    ]
    return [json.loads(line) for line in data if line != "[DONE]"]


# -- chat completions ------------------------------------------------------------------------------

CHAT_TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}}
    for name in ("f", "patch", "space__f", "local_shell")
]
USER = {"role": "user", "content": "hi"}


def _added_up(events: list[Item], index: int) -> Item:
    """Return the message of one choice of a stream, as clients add it up."""
    message: Item = {"role": "assistant", "content": None}
    for event in events:
        for choice in event.get("choices", ()):
            if choice["index"] != index:
                continue
            delta = dict(choice["delta"])
            for call in delta.pop("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    calls.append(call)
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            for name in delta.keys() - {"role"}:
                message[name] = (message.get(name) or "") + delta[name]
    return message


async def _chat(server: Server, said: Said, streamed: bool) -> None:
    body = {"messages": [USER], "tools": CHAT_TOOLS, "max_tokens": said.max_tokens, "stop": STOP}
    server.say(said)
    response = await server.ask("/v1/chat/completions", **body, n=2, stream=streamed)
    if response.status_code != 200:
        assert said.fails  # before it said anything
        return
    if streamed:
        messages = [_added_up(_events(response), index) for index in (0, 1)]
    else:
        messages = [choice["message"] for choice in response.json()["choices"]]
        messages += [ChatCompletionMessage.model_validate(messages[0]).model_dump()]
    for message in messages:
        texts = [message.get("reasoning") or "", message["content"] or ""]
        for call in message.get("tool_calls") or ():
            texts += server.called(call["function"]["name"], call["function"]["arguments"])
        history = [USER, message, {"role": "user", "content": GO_ON}]
        await server.check_back("/v1/chat/completions", [*texts, GO_ON], messages=history)


# -- responses -------------------------------------------------------------------------------------

RESPONSE_TOOLS = [
    {"type": "function", "name": "f", "parameters": SCHEMA},
    {"type": "custom", "name": "patch", "description": "Changes files"},
    {"type": "namespace", "name": "space", "description": "A space", "tools": [
        {"type": "function", "name": "f", "parameters": SCHEMA}]},
    {"type": "local_shell"},
]  # fmt: skip
SEALED = ["reasoning.encrypted_content"]


def _in_items(server: Server, items: list[Item]) -> list[str]:
    texts = []
    for item in items:
        match item["type"]:
            case "function_call":
                space = item.get("namespace")
                name = f"{space}__{item['name']}" if space else item["name"]
                texts += server.called(name, item["arguments"])
            case "custom_tool_call":
                texts += server.called(
                    item["name"], json.dumps({"input": item["input"]}, ensure_ascii=False)
                )
            case "local_shell_call":
                texts += [json.dumps(item["action"]["command"], ensure_ascii=False)]
            case _:
                texts += [part["text"] for part in item["content"]]
    return texts


async def _responses(server: Server, said: Said, streamed: bool) -> None:
    path = "/v1/responses"
    body = {
        "input": "hi", "tools": RESPONSE_TOOLS, "max_output_tokens": said.max_tokens, "stop": STOP
    }  # fmt: skip
    server.say(said)
    response = await server.ask(path, **body, include=SEALED, stream=streamed)
    if response.status_code != 200:
        assert said.fails
        return
    if streamed:
        events = _events(response)
        answer = events[-1]["response"]
        items = [e["item"] for e in events if e["type"] == "response.output_item.done"]
        assert answer["output"] == items
    else:
        answer = response.json()
    output = answer["output"]
    texts = _in_items(server, output)
    again = await server.check_back(
        path, [*texts, "hi", GO_ON], input=GO_ON, previous_response_id=answer["id"]
    )
    await server.check_back(path, [*texts, "hi"], input="So?", previous_response_id=again["id"])
    dumped = [item.model_dump() for item in Response.model_validate(answer).output]
    sealed = [{**item, "content": None} if item["type"] == "reasoning" else item for item in output]
    for items in (output, dumped, sealed):
        history = [{"role": "user", "content": "hi"}, *items, {"role": "user", "content": GO_ON}]
        await server.check_back(path, [*texts, GO_ON], input=history)


# -- messages --------------------------------------------------------------------------------------

MESSAGE_TOOLS = [
    {"name": name, "input_schema": SCHEMA} for name in ("f", "patch", "space__f", "local_shell")
]


def _message(events: list[Item]) -> Item:
    """Return the message of a stream as far as it came, added up as Anthropic's package does it."""
    message: Item = {}
    texts = ""
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                message["content"].append(event["content_block"])
                texts = ""
            case "content_block_delta":
                block, delta = message["content"][-1], event["delta"]
                if delta["type"] == "input_json_delta":
                    texts += delta["partial_json"]
                    with suppress(ValueError):
                        block["input"] = from_json(texts, allow_partial=True)
                else:
                    name = delta["type"].removesuffix("_delta")
                    block[name] += delta[name]
            case "message_delta":
                message |= event["delta"]
    return message


async def _messages(server: Server, said: Said, streamed: bool) -> None:
    path = "/v1/messages"
    body = {
        "messages": [USER], "tools": MESSAGE_TOOLS, "max_tokens": said.max_tokens,
        "stop_sequences": [STOP],
    }  # fmt: skip
    thoughts = ""
    for display in ("summarized", "omitted"):
        thinking = {"type": "adaptive", "display": display}
        server.say(said)
        response = await server.ask(path, **body, thinking=thinking, stream=streamed)
        if response.status_code != 200:
            assert said.fails
            return
        message = _message(_events(response)) if streamed else response.json()
        if display == "summarized":
            thoughts = "".join(block.get("thinking", "") for block in message["content"])
        dumped = [block.model_dump() for block in Message.model_validate(message).content]
        for content in (message["content"], dumped):
            texts = []
            for block in content:
                if block["type"] == "tool_use":
                    arguments = json.dumps(block["input"], ensure_ascii=False)
                    texts += server.called(block["name"], arguments)
                elif block["type"] == "thinking" and display == "omitted":
                    assert not block["thinking"]
                    texts.append(thoughts)  # they come back sealed
                else:
                    texts.append(block.get("text") or block["thinking"])
            history = [
                USER, {"role": "assistant", "content": content}, {"role": "user", "content": GO_ON}
            ]  # fmt: skip
            answer = await server.check_back(path, [*texts, GO_ON], messages=history, max_tokens=9)
            assert answer["content"][0]["text"] == "Well."


@pytest.mark.parametrize("template", [REASONING_TEMPLATE, TEXT_TEMPLATE], ids=["object", "text"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "api", [_chat, _responses, _messages], ids=["chat", "responses", "messages"]
)
def test_every_answer_is_accepted_as_history(api: Any, streamed: bool, template: str) -> None:
    server = Server(template)
    with asyncio.Runner() as runner:

        @settings(max_examples=25, deadline=None, derandomize=True)
        @given(SAID)
        def check(said: Said) -> None:
            runner.run(api(server, said, streamed))

        check()
        runner.run(server.client.aclose())
