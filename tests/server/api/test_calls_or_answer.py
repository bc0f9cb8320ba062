"""A structure beside tools: the model writes either calls in its own format or the structure."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pytest
from pydantic import BaseModel

from quire.engine.grammar.compile import compile_grammar, make_tokenizer
from quire.engine.request import Request
from quire.server.text.tokenizer import Tokenizer

from ..conftest import MakeClient, app_client, make_app
from ..fakes import CHAT_TEMPLATE, IM_END, FakeEngineClient, Script, byte_tokenizer, say
from ..openai_http import CHAT, HI, stream
from .test_forced_calls import BEGIN, CONTROL_TOKENS, FORMATS, HERMES_CALL, OK, OTHER, accepts
from .test_tool_calls import CALL, TOOL, chat, refusal

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY = {"type": "string", "maxLength": 4}
SHORT_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": CITY},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
OTHER_TOOL = {"type": "function", "function": {"name": "other", "parameters": NO_ARGUMENTS}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
AGE_FIRST = {**PERSON, "properties": dict(reversed(PERSON["properties"].items()))}
ADA = '{"name": "Ada", "age": 36}'
HARMONY_CONTROL = (
    "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>",
)  # fmt: skip
ANALYSIS = "<|channel|>analysis<|message|>"
HARMONY_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}"
    "<|end|>{% endfor %}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|> #}"
)


def client_of(engine: FakeEngineClient, tokenizer: Tokenizer, **settings: Any) -> httpx.AsyncClient:
    engine.vocab_size = tokenizer.vocab_size
    return app_client(make_app(engine, tokenizer, **settings))


class Grammars:
    """The grammars that a server makes for chats with tools and a structure."""

    def __init__(
        self, engine: FakeEngineClient, tokenizer: Tokenizer, format: str, **settings: Any
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._client = client_of(engine, tokenizer, tool_call_parser=format, **settings)

    async def of(self, **fields: Any) -> Callable[[str], bool]:
        """Return a predicate for the texts that the grammar lets the model write."""
        given = {"tools": [TOOL, OTHER], "response_format": FORMAT, **fields}
        await chat(self._client, **given)
        spec = self._engine.requests[-1].grammar
        assert spec is not None
        return lambda text: accepts(self._tokenizer, spec, text)


@pytest.mark.parametrize("special", [(), CONTROL_TOKENS], ids=["text", "control tokens"])
@pytest.mark.parametrize(("format", "template", "call", "frame", "separator"), FORMATS)
async def test_the_model_may_write_calls_or_the_structure(
    engine: FakeEngineClient,
    special: tuple[str, ...],
    format: str,
    template: str,
    call: str,
    frame: str,
    separator: str,
) -> None:
    tokenizer = byte_tokenizer(CHAT_TEMPLATE + template, special)
    grammars = Grammars(engine, tokenizer, format)
    one = frame.format(call.format("weather", OK))
    two = frame.format(call.format("weather", OK) + separator + call.format("other", "{}"))
    thought = "<think>\nHm.\n</think>\n\n"
    allowed = await grammars.of()
    assert all(map(allowed, (one, two, ADA, thought + two, thought + ADA)))
    wrong = (ADA + one, one + ADA, "Ada", '{"name": "Ada"}', frame.format(call.format("x", "{}")))
    assert not any(map(allowed, wrong))
    allowed = await grammars.of(parallel_tool_calls=False)
    assert allowed(one) and allowed(ADA) and not allowed(two)
    allowed = await grammars.of(tool_choice="none")
    assert allowed(ADA) and allowed(thought + ADA) and not allowed(one)
    allowed = await grammars.of(tool_choice="required")
    assert allowed(two) and not allowed(ADA)
    named = {"type": "function", "function": {"name": "weather"}}
    allowed = await grammars.of(tool_choice=named)
    assert allowed(one) and not allowed(two) and not allowed(ADA)


async def test_harmony_calls_on_one_channel_and_answers_on_another(
    engine: FakeEngineClient,
) -> None:
    tokenizer = byte_tokenizer(HARMONY_TEMPLATE, HARMONY_CONTROL)
    grammars = Grammars(engine, tokenizer, "auto")
    call = f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{OK}"
    answer = f"<|channel|>final<|message|>{ADA}"
    thought = f"{ANALYSIS}Hm.<|end|><|start|>assistant"
    allowed = await grammars.of()
    assert all(map(allowed, (call, answer, thought + call, thought + answer)))
    assert not any(map(allowed, (ADA, OK, call + answer, f"<|channel|>final<|message|>{OK}")))
    allowed = await grammars.of(tools=None)
    assert allowed(answer) and allowed(thought + answer) and not allowed(call)
    continued = [*HI["messages"], {"role": "assistant", "content": '{"name"'}]
    fields = {"messages": continued, "continue_final_message": True}
    allowed = await grammars.of(tools=None, **fields)
    assert allowed(ADA) and not allowed(answer)


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")], ids=["text", "control tokens"])
async def test_a_model_inside_its_reasoning_may_still_open_it(
    engine: FakeEngineClient, special: tuple[str, ...]
) -> None:
    tokenizer = byte_tokenizer(CHAT_TEMPLATE, special)
    grammars = Grammars(engine, tokenizer, "hermes", reasoning_parser="deepseek_r1")
    allowed = await grammars.of()
    call = HERMES_CALL.format("weather", OK)
    for text in (
        f"Hm.</think>{ADA}",
        f"<think>\nHm.</think>\n\n{ADA}",
        f"<think>Hm.</think>{call}",
    ):
        assert allowed(text)
    assert not allowed(ADA) and not allowed(call)


async def test_other_structures_stand_beside_tools_too(engine: FakeEngineClient) -> None:
    tokenizer = byte_tokenizer(CHAT_TEMPLATE, CONTROL_TOKENS)
    grammars = Grammars(engine, tokenizer, "hermes")
    call = HERMES_CALL.format("weather", OK)
    for outputs, text in (
        ({"regex": "[a-z]/{2}"}, "b//"),
        ({"choice": ["yes", "né"]}, "né"),
        ({"grammar": 'start: "(" start ")" | "x"'}, "((x))"),
    ):
        fields = {"response_format": None, "structured_outputs": outputs}
        allowed = await grammars.of(**fields)
        assert allowed(text) and allowed(call) and not allowed(text + call)
    tag = {"begin": "<f>", "schema": {"type": "null"}, "end": "</f>"}
    tags = {"type": "structural_tag", "triggers": ["<f"], "structures": [tag]}
    allowed = await grammars.of(response_format=tags)
    assert allowed("a<f>null</f>b") and not allowed("a<f>1")


def random_model(tokenizer: Tokenizer, seed: int, bias: float) -> Any:
    """Return scripts that draw each token at random from those that the grammar allows. With the
    probability `bias` a control token is taken if one is allowed."""
    vocabulary = make_tokenizer(tokenizer.backend.to_str(), tokenizer.vocab_size, [IM_END])
    special = set(tokenizer.special_ids.values())

    def script(request: Request, choice: int) -> Script:
        rng = random.Random(f"{seed} {choice}")
        assert request.grammar is not None
        matcher = compile_grammar(vocabulary, request.grammar)
        tokens: list[int] = []
        while not matcher.is_stopped() and len(tokens) < 400:
            words = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.flatnonzero(np.unpackbits(words, bitorder="little")).tolist()
            marks = [token for token in allowed if token in special]
            token = rng.choice(marks if marks and rng.random() < bias else allowed)
            matcher.consume_token(token)
            tokens.append(token)
        ended = matcher.is_stopped()
        return Script(tokens, "stop" if ended else "length", eos=tokens[-1] != IM_END)

    return script


def check_message(message: dict[str, Any]) -> str:
    """Check that a message has either valid calls or a valid structure, and return which."""
    calls = message.get("tool_calls") or []
    for call in calls:
        schema = {"weather": SHORT_TOOL, "other": OTHER_TOOL}[call["function"]["name"]]
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, schema["function"]["parameters"])  # type: ignore[index]
    if calls:
        assert not message["content"]
        return "calls"
    jsonschema.validate(json.loads(message["content"]), PERSON)
    return "answer"


@pytest.mark.parametrize(
    ("format", "template", "special"),
    [
        ("hermes", CHAT_TEMPLATE, ("<think>", "</think>")),
        ("llama3_json", CHAT_TEMPLATE, ("<think>", "</think>")),
        ("mistral", CHAT_TEMPLATE + "{# [ARGS] #}", ("[TOOL_CALLS]", "[ARGS]", "</think>")),
        ("deepseek_v3", CHAT_TEMPLATE, (*CONTROL_TOKENS, "<think>")),
        ("auto", HARMONY_TEMPLATE, HARMONY_CONTROL),
    ],
)
async def test_a_random_model_always_calls_or_answers(
    engine: FakeEngineClient, format: str, template: str, special: tuple[str, ...]
) -> None:
    tokenizer = byte_tokenizer(template, special)
    seen = set()
    engine.max_model_len = engine.num_blocks = 2048
    # Otherwise a call in llama3_json would differ from the structure only in the name's value.
    structure = {"type": "json_schema", "json_schema": {"name": "x", "schema": AGE_FIRST}}
    async with client_of(engine, tokenizer, tool_call_parser=format) as client:
        for seed in range(5):
            engine.scripts = random_model(tokenizer, seed, bias=0.4)
            fields = {"tools": [SHORT_TOOL, OTHER_TOOL], "response_format": structure, "n": 4}
            response = await client.post(CHAT, json={**HI, **fields})
            assert response.status_code == 200, response.text
            choices = response.json()["choices"]
            streamed = await collected(client, **fields)
            for choice, other in zip(choices, streamed, strict=True):
                message = choice["message"]
                assert other == {
                    "content": message["content"] or "",
                    "reasoning": message.get("reasoning", ""),
                    "calls": [call["function"] for call in message.get("tool_calls") or []],
                    "finish_reason": choice["finish_reason"],
                }
                if choice["finish_reason"] != "length":
                    seen.add(kind := check_message(message))
                    assert choice["finish_reason"] == {"calls": "tool_calls"}.get(kind, "stop")
                    seen.add("reasoning" if message.get("reasoning") else "none")
    assert {"calls", "answer"} <= seen and len(seen) == 4


async def collected(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """Return the choices of a stream, added up."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in await stream(client, CHAT, **HI, **fields):
        [choice] = chunk["choices"]
        empty = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
        mine = found.setdefault(choice["index"], empty)
        delta = choice["delta"]
        mine["content"] += delta.get("content") or ""
        mine["reasoning"] += delta.get("reasoning") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                mine["calls"].append(dict(call["function"]))
            else:
                mine["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        mine["finish_reason"] = choice["finish_reason"]
    return [found[index] for index in sorted(found)]


class Person(BaseModel):
    name: str
    age: int


class Weather(BaseModel):
    city: str


async def test_the_sdk_parses_either(client: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    engine.max_model_len = engine.num_blocks = 2048
    sdk = openai.AsyncOpenAI(
        base_url="http://quire/v1", api_key="x", max_retries=0, http_client=client
    )
    tool = openai.pydantic_function_tool(Weather, name="weather")
    fields: dict[str, Any] = {**HI, "tools": [tool], "response_format": Person}
    engine.scripts = say(f"<think>Hm.</think>\n\n{ADA}")
    whole = await sdk.chat.completions.parse(**fields)
    assert whole.choices[0].message.parsed == Person(name="Ada", age=36)
    engine.scripts = say(CALL)
    async with sdk.chat.completions.stream(**fields) as events:
        final = await events.get_final_completion()
    message = final.choices[0].message
    assert not message.content and message.parsed is None
    [call] = message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)


async def test_a_structure_that_contains_a_call_is_content(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    text = json.dumps({"name": f"<tool_call>{BEGIN}[TOOL_CALLS]weather{{}}", "age": 1})
    engine.scripts = say(text)
    message = (await chat(client, tools=[TOOL], response_format=FORMAT))["message"]
    assert message["content"] == text and "tool_calls" not in message
    # An answer that is cut within what may become either is content.
    engine.scripts = say("<tool_c", finish="length")
    message = (await chat(client, tools=[TOOL], response_format=FORMAT))["message"]
    assert message["content"] == "<tool_c"


async def test_what_cannot_be_combined_is_refused_by_name(
    engine: FakeEngineClient, make_client: MakeClient
) -> None:
    fields = {"tools": [TOOL], "response_format": FORMAT}
    param, message = await refusal(make_client(tool_call_parser="pythonic"), **fields)
    assert param == "response_format.json_schema.schema" and "format of calls" in message
    client = make_client(tool_call_parser="hermes")
    bad = {"type": "object", "properties": {"a": {"not": {}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": bad}}
    param, message = await refusal(client, tools=[tool], response_format=FORMAT)
    assert param == "tools" and "not" in message
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": bad}}
    param, _ = await refusal(client, tools=[tool], response_format=wrong)
    assert param == "response_format.json_schema.schema"
    for name, value in (("bad_words", ["x"]), ("allowed_token_ids", [1])):
        param, _ = await refusal(client, **fields, **{name: value})
        assert param == name
    assert not engine.requests


async def test_the_other_dialects_send_both(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.max_model_len = engine.num_blocks = 2048
    function = TOOL["function"]
    responses = {
        "input": "hi",
        "tools": [{"type": "function", **function}],
        "text": {"format": {"type": "json_schema", "name": "person", "schema": PERSON}},
    }
    messages = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 200,
        "tools": [{"name": function["name"], "input_schema": function["parameters"]}],
        "output_config": {"format": {"type": "json_schema", "schema": PERSON}},
    }
    for text, is_call in ((CALL, True), (ADA, False)):
        engine.scripts = say(text)
        answer = (await client.post("/v1/responses", json=responses)).json()
        kinds = [item["type"] for item in answer["output"]]
        assert kinds == ["function_call" if is_call else "message"]
        answer = (await client.post("/v1/messages", json=messages)).json()
        kinds = [block["type"] for block in answer["content"]]
        assert kinds == ["tool_use" if is_call else "text"]
    for request in engine.requests:
        assert request.grammar is not None and request.grammar.kind == "nested"
