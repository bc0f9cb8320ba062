"""What chat templates read is found out, and conversations are written accordingly."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.errors import InvalidRequestError
from quire.server.templates import probe_renders
from quire.server.templates.template_traits import TemplateTraits
from quire.server.text.tokenizer import Tokenizer

from ..fakes import byte_tokenizer
from .templates import FAMILIES

SPECIAL = ("<s>", "</s>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
DEFAULTS: dict[str, Any] = {
    "user": "text",
    "assistant": "text",
    "system": "text",
    "tool": "text",
    "developer": False,
    "system_beside_tools": True,
    "several_systems": True,
    "lasting_system": True,
    "late_system": True,
    "repeated_user": True,
    "repeated_assistant": True,
    "history": True,
    "user_name": False,
    "calls": False,
    "arguments": "object",
    "flat_calls": False,
    "short_call_ids": False,
    "empty_content": "empty",
    "parallel_calls": "none",
    "content_beside_calls": "none",
    "tool_name": False,
    "reasoning": None,
    "reasoning_beside_content": True,
    "tools": "none",
    "needs_description": False,
    "documents": (),
    "thinking": (),
}
CALLS = {
    "calls": True,
    "tools": "nested",
    "parallel_calls": "together",
    "content_beside_calls": "together",
}
ALTERNATE = {
    "several_systems": False,
    "late_system": False,
    "repeated_user": False,
    "repeated_assistant": False,
}
ONE_SYSTEM = {"several_systems": False, "late_system": False}
EITHER = {"user": "either", "assistant": "either", "system": "either", "tool": "either"}
# Family → what differs from DEFAULTS. The comments in templates.py give the reasons.
EXPECTED: dict[str, dict[str, Any]] = {
    "chatml": {},
    "llama2": {**ALTERNATE, "tool": "refused"},
    "llama3": {},
    "llama3.1": {**CALLS, "parallel_calls": "apart", "content_beside_calls": "apart"},
    "llama4": {**CALLS, **EITHER, "tools": "none"},
    "mistral-v1": {**ALTERNATE, "system": "refused", "lasting_system": False, "tool": "refused"},
    "mistral-v3": {**CALLS, **ALTERNATE, "short_call_ids": True, "content_beside_calls": "apart"},
    "mistral-last": {
        **CALLS,
        **ONE_SYSTEM,
        "tools": "none",
        "lasting_system": False,
        "content_beside_calls": "apart",
    },
    "mistral-tekken": {**CALLS, "user": "either", "arguments": "text"},
    "qwen2.5": CALLS,
    "qwen3": {**CALLS, "reasoning": "reasoning_content", "thinking": ("enable_thinking",)},
    "gemma2": {**ALTERNATE, "system": "refused", "lasting_system": False, "tool": "refused"},
    "gemma3": {**ALTERNATE, "user": "either", "assistant": "either", "tool": "refused"},
    "phi3": {**ONE_SYSTEM, "system": "none", "lasting_system": False, "tool": "none"},
    "phi4": {},
    "deepseek-r1": {
        **CALLS,
        **ONE_SYSTEM,
        "tools": "none",
        "arguments": "text",
        "empty_content": "null",
        "content_beside_calls": "apart",
    },
    "command": {**ONE_SYSTEM, "tool": "none", "documents": ("*",)},
    "granite3": {**CALLS, "documents": ("title", "text")},
    "smollm3": {**ONE_SYSTEM, "thinking": ("enable_thinking",)},
    "harmony": {
        **CALLS,
        **ONE_SYSTEM,
        "developer": True,
        "parallel_calls": "apart",
        "reasoning": "thinking",
        "thinking": ("reasoning_effort",),
        "reasoning_beside_content": False,
        "needs_description": True,
    },
    "llava": dict.fromkeys(EITHER, "parts"),
    "qwen-vl": EITHER,
    "zephyr": {"tool": "none"},
    "glm4": {**CALLS, "reasoning": "reasoning_content"},
    "kimi": {**CALLS, **EITHER, "tool": "text", "user_name": True, "tool_name": True},
    "flat": {**CALLS, "tools": "flat", "flat_calls": True},
}
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}},
}


def tokenizer_of(template: str) -> Tokenizer:
    return byte_tokenizer(template, SPECIAL)


def traits_of(template: str) -> TemplateTraits:
    return tokenizer_of(template).templates.traits(template)


async def prompt_of(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = tokenizer_of(template)
    options.setdefault("add_generation_prompt", True)
    prompt = await tokenizer.encode_chat(messages, **options)
    return b"".join(map(tokenizer.token_bytes, prompt.token_ids)).decode()


def say(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def calls_of(*ids: str) -> list[dict[str, Any]]:
    return [
        {
            "id": call_id,
            "type": "function",
            "function": {
                "name": f"name_{call_id}",
                "arguments": f'{{"k_{call_id}": "v_{call_id}"}}',
            },
        }
        for call_id in ids
    ]


# -- what is found out -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_traits_of_each_family(family: str) -> None:
    found = traits_of(FAMILIES[family]).as_dict()
    assert {name: found[name] for name in DEFAULTS} == DEFAULTS | EXPECTED[family]
    assert found["calls_without_tools"] == found["calls"]


@pytest.mark.parametrize(
    ("family", "generation_prompt", "turn_end"),
    [
        ("chatml", "<|im_start|>assistant\n", "<|im_end|>"),
        ("llama2", "", "</s>"),
        ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        ("gemma2", "<start_of_turn>model\n", "<end_of_turn>"),
        ("phi3", "<|assistant|>\n", "<|end|>"),
        ("deepseek-r1", "<｜Assistant｜><think>\n", ""),  # its end is no token of this tokenizer
    ],
)
def test_how_the_assistants_turn_begins_and_ends(
    family: str, generation_prompt: str, turn_end: str
) -> None:
    traits = traits_of(FAMILIES[family])
    assert (traits.generation_prompt, traits.turn_end) == (generation_prompt, turn_end)


def test_settings_are_the_variables_that_a_request_may_set() -> None:
    template = "{{ bos_token }}{{ style }}{{ messages[0].content }}{{ tools }}{{ range(1) | list }}"
    assert traits_of(template).settings == ("style",)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_is_probed_with_few_renders(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, count = FAMILIES[family], itertools.count()
    probe = probe_renders.ProbeRenders.text

    def counted(self: Any, *args: Any, **fields: Any) -> str:
        next(count)
        return probe(self, *args, **fields)

    monkeypatch.setattr(probe_renders.ProbeRenders, "text", counted)
    tokenizer = tokenizer_of(template)
    tokenizer.templates.traits(template)
    assert next(count) <= 60
    tokenizer.templates.traits(template)
    assert next(count) <= 61  # remembered


@pytest.mark.parametrize("template", ["tool_calls", "{% if tools %}tool_calls{% endif %}"])
def test_a_template_that_writes_nothing_is_probed_within_the_limit(template: str) -> None:
    traits = traits_of(template)
    assert (traits.user, traits.calls, traits.tools) == ("none", False, "none")
    assert traits.shortcomings()[0].startswith("users' text is not written")


async def test_a_template_that_cannot_be_tried_out_gets_messages_as_they_are() -> None:
    template = (
        "{% if style is not defined %}{{ raise_exception('no style') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    traits = traits_of(template)
    assert not traits.probed
    assert traits.shortcomings()[0].startswith("it refuses the simplest chat")
    messages = [say("system", "S"), say("user", "U"), say("user", "V")]
    text = await prompt_of(template, messages, template_kwargs={"style": 1})
    assert text == "system: S\nuser: U\nuser: V\n"
    with pytest.raises(InvalidRequestError, match="no style"):
        await prompt_of(template, messages)


async def test_a_template_that_wants_a_system_message_is_probed_with_one() -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        + FAMILIES["chatml"]
    )
    traits = traits_of(template)
    assert (traits.probed, traits.user, traits.assistant, traits.late_system) == (
        True,
        "text",
        "text",
        True,
    )
    with pytest.raises(InvalidRequestError, match="system first"):
        await prompt_of(template, [say("user", "U")])


async def test_calls_that_the_template_refuses_are_left_to_its_own_error() -> None:
    template = FAMILIES["chatml"] + (
        "{% for m in messages %}{% if m.tool_calls %}{{ raise_exception('only from ' + by) }}"
        "{% endif %}{% endfor %}"
    )
    messages = [say("user", "U"), say("assistant", "", tool_calls=calls_of("1"))]
    with pytest.raises(InvalidRequestError, match="refused the messages"):
        await prompt_of(template, messages)


def test_shortcomings_are_logged_when_the_tokenizer_is_loaded(tmp_path: Any) -> None:
    tokenizer_of(FAMILIES["phi3"])._hf.save_pretrained(str(tmp_path))
    with structlog.testing.capture_logs() as entries:
        Tokenizer.load(str(tmp_path))
    found = [entry["shortcoming"] for entry in entries if entry["event"] == "chat_template"]
    assert "system messages are not written: their text goes before the user's" in found
    assert all(entry["log_level"] == "warning" for entry in entries)


# -- nothing is lost -------------------------------------------------------------------------


def words_in(value: Any) -> list[str]:
    """Return the words of all texts, names and arguments in messages."""
    found: list[str] = []
    for message in value:
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else [part["text"] for part in content]
        found += [word for part in parts for word in part.split()]
        for call in message.get("tool_calls", ()):
            found.append(call["function"]["name"])
            for pair in json.loads(call["function"]["arguments"]).items():
                found += pair
    return found


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    """Draw conversations of all roles in any order, with a word of its own in each text."""
    numbers = itertools.count(100)

    def content() -> Any:
        count = draw(st.integers(1, 3))
        if count == 1:
            return f"w{next(numbers)}"
        return [{"type": "text", "text": f"w{next(numbers)}"} for _ in range(count)]

    messages: list[dict[str, Any]] = []
    for kind in draw(st.lists(st.sampled_from("sduuaact"), min_size=1, max_size=6)):
        role = {"s": "system", "d": "developer", "u": "user", "a": "assistant"}.get(kind)
        if role is not None:
            messages.append(say(role, content()))
            continue
        if not messages or messages[-1]["role"] != "user":
            messages.append(say("user", content()))
        ids = [str(next(numbers)) for _ in range(draw(st.integers(1, 3)))]
        text = draw(st.sampled_from(["", "w99"]))
        messages.append(say("assistant", text, tool_calls=calls_of(*ids)))
        messages += [say("tool", f"w{next(numbers)}", tool_call_id=call_id) for call_id in ids]
    return messages


TOKENIZERS = {family: tokenizer_of(template) for family, template in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_each_text_is_in_the_prompt_or_the_request_is_refused(family: str, data: Any) -> None:
    tokenizer, template = TOKENIZERS[family], FAMILIES[family]
    messages = data.draw(conversations())
    before = json.dumps(messages)
    try:
        rendered = tokenizer.templates.render(template, messages, {"add_generation_prompt": True})
    except InvalidRequestError as error:
        assert error.param is not None and error.param.startswith("messages")
        return
    missing = [word for word in words_in(messages) if word not in rendered.text]
    if rendered.dropped:
        missing = [word for word in missing if word != "w99"]
    assert not missing, (missing, rendered.text)
    assert json.dumps(messages) == before  # what was given is not changed


# -- how it is written -----------------------------------------------------------------------


async def test_text_becomes_parts_and_parts_become_text() -> None:
    user = say("user", "one")
    two = say("user", [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])
    assert await prompt_of(FAMILIES["llava"], [user]) == "USER: one ASSISTANT:"
    assert await prompt_of(FAMILIES["llava"], [two]) == "USER: one / two ASSISTANT:"
    assert "user\none\ntwo<|im_end|>" in await prompt_of(FAMILIES["chatml"], [two])
    assert "user\nonetwo<|im_end|>" in await prompt_of(FAMILIES["qwen-vl"], [two])


@pytest.mark.parametrize(
    ("family", "messages", "expected", "changes"),
    [
        (  # refused by the template
            "gemma2",
            [say("system", "S"), say("user", "U")],
            "<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n",
            ("system-in-user",),
        ),
        (  # dropped by the template
            "phi3",
            [say("system", "S"), say("user", "U")],
            "<|user|>\nS\n\nU<|end|>\n<|assistant|>\n",
            ("system-in-user",),
        ),
        (  # no user message to put it into
            "phi3",
            [say("system", "S")],
            "<|user|>\nS<|end|>\n<|assistant|>\n",
            ("system-in-user",),
        ),
        (  # two at the beginning, and a template that reads the first one
            "llama2",
            [say("system", "S"), say("developer", "D"), say("user", "U")],
            "<s>[INST] <<SYS>>\nS\n\nD\n<</SYS>>\n\nU [/INST]",
            ("system-joined",),
        ),
        (  # a template that writes it only before the last message
            "mistral-last",
            [say("system", "S"), say("user", "U"), say("assistant", "", tool_calls=calls_of("1")),
             say("tool", "R", tool_call_id="1")],
            '<s>[INST] S\n\nU[/INST][TOOL_CALLS] [{"name": "name_1", "arguments": '
            '{"k_1": "v_1"}}]</s>[TOOL_RESULTS] R[/TOOL_RESULTS]',
            ("system-in-user",),
        ),
        (  # one amid the turns
            "llama2",
            [say("user", "U"), say("assistant", "A"), say("system", "S"), say("user", "V")],
            "<s>[INST] U [/INST] A </s><s>[INST] S\n\nV [/INST]",
            ("system-in-user",),
        ),
        (  # roles that must alternate
            "mistral-v1",
            [say("user", "U"), say("user", "V"), say("assistant", "A"), say("assistant", "B"),
             say("user", "W")],
            "<s>[INST] U\n\nV [/INST] A\n\nB</s>[INST] W [/INST]",
            ("turns-joined",),
        ),
        (  # a template that knows the developer
            "harmony",
            [say("developer", "D"), say("user", "U")],
            "<|start|>system<|message|>Reasoning: medium<|end|>"
            "<|start|>developer<|message|>D<|end|>"
            "<|start|>user<|message|>U<|end|><|start|>assistant",
            (),
        ),
        (  # one that does not, and all as they are
            "chatml",
            [say("developer", "D"), say("user", "U"), say("user", "V")],
            "<|im_start|>system\nD<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
            "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
            (),
        ),
    ],
)  # fmt: skip
async def test_instructions_and_turns_go_where_the_template_writes_them(
    family: str, messages: list[dict[str, Any]], expected: str, changes: tuple[str, ...]
) -> None:
    assert await prompt_of(FAMILIES[family], messages) == expected
    prompt = await TOKENIZERS[family].encode_chat(messages, add_generation_prompt=True)
    assert (prompt.changes, prompt.dropped) == (changes, ())


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2.5", '<tool_call>\n{"name": "name_1", "arguments": {"k_1": "v_1"}}\n</tool_call>'),
        ("mistral-tekken", '[TOOL_CALLS]name_1[ARGS]{"k_1": "v_1"}</s>'),
        ("deepseek-r1", 'name_1\n```json\n{"k_1": "v_1"}\n```'),
        ("glm4", "<tool_call>name_1<arg_key>k_1</arg_key>\n<arg_value>v_1</arg_value>"),
        ("flat", '<call>name_1 {"k_1": "v_1"}</call>'),
    ],
)
async def test_arguments_are_written_once(family: str, expected: str) -> None:
    messages = [
        say("user", "U"),
        say("assistant", "", tool_calls=calls_of("1")),
        say("tool", "R", tool_call_id="1"),
    ]
    assert expected in await prompt_of(FAMILIES[family], messages)


async def test_long_ids_become_nine_characters_where_they_must() -> None:
    messages = [
        say("user", "U"),
        say("assistant", "", tool_calls=calls_of("call_of_some_length", "123456789")),
        say("tool", "R", tool_call_id="call_of_some_length"),
        say("tool", "S", tool_call_id="123456789"),
    ]
    text = await prompt_of(FAMILIES["mistral-v3"], messages)
    assert '"id": "123456789"' in text and '"call_id": "123456789"' in text
    [short] = {part.split('"')[0] for part in text.split('id": "')[1:]} - {"123456789"}
    assert len(short) == 9 and text.count(short) == 2


async def test_calls_of_one_turn_are_written_apart_with_their_results() -> None:
    messages = [
        say("user", "U"),
        say("assistant", "T", tool_calls=calls_of("1", "2")),
        say("tool", "R2", tool_call_id="2"),
        say("tool", "R1", tool_call_id="1"),
    ]
    text = await prompt_of(FAMILIES["llama3.1"], messages)
    order = ["T", "name_1", "R1", "name_2", "R2"]
    assert [text.index(word) for word in order] == sorted(text.index(word) for word in order)
    prompt = await TOKENIZERS["llama3.1"].encode_chat(messages, add_generation_prompt=True)
    assert prompt.changes == ("calls-apart",)


async def test_ids_that_come_again_in_a_later_turn_keep_their_own_results() -> None:
    messages = [
        say("user", "U"),
        say("assistant", "", tool_calls=calls_of("1", "2")),
        say("tool", "first", tool_call_id="1"),
        say("tool", "second", tool_call_id="2"),
        say("assistant", "", tool_calls=calls_of("1", "2")),
        say("tool", "third"),
        say("tool", "fourth"),
    ]
    text = await prompt_of(FAMILIES["llama3.1"], messages)
    found = re.findall(r"name_\d|first|second|third|fourth", text)
    assert found == [
        *("name_1", "first", "name_2", "second"),
        *("name_1", "third", "name_2", "fourth"),
    ]


async def test_an_empty_list_of_calls_is_none() -> None:
    messages = [say("user", "U"), say("assistant", "A", tool_calls=[]), say("user", "V")]
    assert "assistant<|end_header_id|>\n\nA<|eot_id|>" in await prompt_of(
        FAMILIES["llama3.1"], messages
    )


async def test_a_result_gets_the_name_of_its_call_if_the_template_reads_it() -> None:
    messages = [
        say("user", "U"),
        say("assistant", "", tool_calls=calls_of("7")),
        say("tool", "R", tool_call_id="7"),
    ]
    assert "<|im_system|>name_7<|im_middle|>## Return of 7\nR" in await prompt_of(
        FAMILIES["kimi"], messages
    )


async def test_reasoning_goes_under_the_name_that_is_read() -> None:
    answer = say("assistant", "", reasoning_content="because", tool_calls=calls_of("1"))
    messages = [say("user", "U"), answer, say("tool", "R", tool_call_id="1")]
    for family in ("qwen3", "glm4", "harmony"):
        assert "because" in await prompt_of(FAMILIES[family], messages)
    messages[1] = {**answer, "content": "aside"}  # harmony's template refuses both
    text = await prompt_of(FAMILIES["harmony"], messages)
    assert "aside" in text and "because" not in text


async def test_tools_get_the_form_that_is_read() -> None:
    user = [say("user", "U")]
    assert "// \ntype look = at" in await prompt_of(FAMILIES["harmony"], user, tools=[TOOL])
    assert (await prompt_of(FAMILIES["flat"], user, tools=[TOOL])).startswith("look: ")
    assert '"function": {"name": "look"' in await prompt_of(FAMILIES["qwen3"], user, tools=[TOOL])


@pytest.mark.parametrize(
    ("family", "messages", "options", "param"),
    [
        ("phi3", [say("user", "U"), say("tool", "R", tool_call_id="1")], {}, "messages[1].role"),
        (
            "chatml",
            [say("user", "U"), say("assistant", "", tool_calls=calls_of("1"))],
            {},
            "messages[1].tool_calls",
        ),
        ("gemma2", [say("user", "U")], {"tools": [TOOL]}, "tools"),
        ("granite3", [say("user", "U")], {"documents": [{"body": "x"}]}, "documents[0]"),
        ("chatml", [say("user", "U")], {"documents": [{"text": "x"}]}, "documents"),
    ],
)
async def test_what_would_be_lost_is_refused_by_name(
    family: str, messages: list[dict[str, Any]], options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await prompt_of(FAMILIES[family], messages, **options)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("template", "messages", "param"),
    [
        ("{{ messages[0].role }}", [say("user", "U")], "messages[0].content"),
        ("{{ messages[0].role }}", [say("system", "S")], "messages[0].content"),
        (
            "{{ messages[0].content }}",
            [say("user", "U"), say("assistant", "A"), say("user", "V")],
            "messages[1].content",
        ),
        (
            "{{ messages[-1].content }}",
            [say("user", "U"), say("user", "V")],
            "messages[1].content",
        ),
    ],
)
async def test_a_template_that_reads_one_message_serves_one_turn(
    template: str, messages: list[dict[str, Any]], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await prompt_of(template, messages)
    assert refused.value.param == param


async def test_fields_that_are_not_read_are_named() -> None:
    messages = [say("user", "U", name="Ann")]
    options: dict[str, Any] = {"add_generation_prompt": True}
    prompt = await TOKENIZERS["chatml"].encode_chat(messages, **options)
    assert prompt.dropped == ("messages[0].name",)
    prompt = await TOKENIZERS["kimi"].encode_chat(messages, **options)
    assert prompt.dropped == ()
    documents = [{"title": "t", "text": "x", "score": "1"}]
    prompt = await TOKENIZERS["granite3"].encode_chat(messages, documents=documents, **options)
    assert "documents[0].score" in prompt.dropped
    prompt = await TOKENIZERS["command"].encode_chat(messages, documents=documents, **options)
    assert "documents[0].score" not in prompt.dropped


# -- several templates -----------------------------------------------------------------------


async def test_templates_for_tools_and_documents_are_chosen_by_the_request(tmp_path: Any) -> None:
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    tokenizer._hf.save_pretrained(str(tmp_path))
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text(FAMILIES["qwen2.5"])
    (extra / "rag.jinja").write_text(FAMILIES["command"])
    tokenizer = Tokenizer.load(str(tmp_path))
    user = [say("user", "U")]

    async def text(messages: list[dict[str, Any]], **options: Any) -> str:
        prompt = await tokenizer.encode_chat(messages, add_generation_prompt=True, **options)
        return b"".join(map(tokenizer.token_bytes, prompt.token_ids)).decode()

    assert await text(user) == "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert '<tools>{"type": "function"' in await text(user, tools=[TOOL])
    assert "text: x" in await text(user, documents=[{"text": "x"}])
    calls = [*user, say("assistant", "", tool_calls=calls_of("1")), say("tool", "R")]
    assert "name_1" in await text(calls)  # the default writes no calls
    assert tokenizer.info()["chat_templates"].keys() == {"default", "tool_use", "rag"}
