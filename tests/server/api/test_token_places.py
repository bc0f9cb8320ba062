"""Decisions on tokens: text_offset, echo, the keys of top_logprobs, stop strings of tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from quire.engine.outputs import TokenLogprobs
from quire.server.api.logprobs import LogprobFormat
from quire.server.text.tokenizer import Tokenizer

from ..conftest import app_client, make_app
from ..fakes import IM_END, IM_START, FakeEngineClient, Script, byte_tokenizer, ids, say
from ..openai_http import CHAT, COMPLETIONS, HI, stream
from ..text.tokenizers_of_kinds import KINDS, build


@asynccontextmanager
async def serve(engine: FakeEngineClient, tokenizer: Tokenizer) -> AsyncIterator[httpx.AsyncClient]:
    engine.vocab_size = max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1
    async with app_client(make_app(engine, tokenizer)) as client:
        yield client


async def complete(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """Return the only choice of a completion; a stream of it must add up to the same."""
    response = await client.post(COMPLETIONS, json=fields)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    for name in ("prompt_logprobs", "prompt_token_ids", "token_ids"):
        assert choice.pop(name) is None  # in streams they are missing
    added: dict[str, Any] = {}
    for chunk in await stream(client, COMPLETIONS, **fields):
        [piece] = chunk["choices"]
        if not added:
            added = piece
            continue
        added["text"] += piece["text"]
        for name, values in (piece["logprobs"] or {}).items():
            added["logprobs"][name] += values
        added |= {name: piece[name] for name in ("finish_reason", "stop_reason")}
    assert added == choice
    return dict(choice)


def check_offsets(choice: dict[str, Any]) -> None:
    """Each offset points into the text, none is before the last, and where a token's name is in the
    text it begins there."""
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)
    assert len(offsets) == len(choice["logprobs"]["tokens"])


# -- text_offset -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "fields", "text", "offsets"),
    [
        (ids("abc"), {}, "abc", [0, 1, 2, 3]),  # the last one is that of <|im_end|>
        # All tokens of a character begin where it does.
        (ids("aé€b"), {}, "aé€b", [0, 1, 1, 2, 2, 2, 3, 4]),
        # A control token that is not shown is where the next token is.
        ([*ids("a"), IM_START, *ids("b")], {}, "ab", [0, 1, 1, 2]),
        # One that is shown takes its place.
        (
            [*ids("a"), IM_START, *ids("b")],
            {"skip_special_tokens": False},
            "a<|im_start|>b",
            [0, 1, 13, 14],
        ),
        # A stop string cuts the text. Its tokens are where it was.
        (ids("abcd"), {"stop": "cd"}, "ab", [0, 1, 2, 2]),
        # Its beginning was held back, and then was none.
        (ids("aab aab!"), {"stop": "aab?"}, "aab aab!", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (ids("aaab"), {"stop": "aab"}, "a", [0, 1, 1, 1]),
        # An incomplete character at the end is one U+FFFD.
        (ids("aé")[:2], {}, "a\ufffd", [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3])
async def test_offsets_point_into_the_answer(
    client: httpx.AsyncClient,
    engine: FakeEngineClient,
    tokens: list[int],
    fields: dict[str, Any],
    text: str,
    offsets: list[int],
    chunk: int,
) -> None:
    engine.scripts = lambda request, choice: Script(tokens, chunk=chunk)
    choice = await complete(client, prompt="p", logprobs=1, **fields)
    assert choice["text"] == text
    assert choice["logprobs"]["text_offset"] == offsets
    check_offsets(choice)


@pytest.mark.parametrize(
    ("prompt", "text", "offsets"),
    [
        # A text is given back as it is, control tokens included.
        ("hé<|im_end|>y", "hé<|im_end|>y", [0, 1, 1, 2, 12]),
        # Ids are decoded, without control tokens.
        ([*ids("hé"), IM_END, *ids("y")], "héy", [0, 1, 1, 2, 2]),
        # A character that is cut at the end.
        (ids("hé")[:2], "h\ufffd", [0, 1]),
    ],
)
async def test_the_echo_is_the_prompt_as_it_was(
    client: httpx.AsyncClient, engine: FakeEngineClient, prompt: Any, text: str, offsets: list[int]
) -> None:
    engine.scripts = say("ok", eos=False, finish="length")
    choice = await complete(client, prompt=prompt, logprobs=1, echo=True, max_tokens=2)
    assert choice["text"] == text + "ok"
    after = [len(text), len(text) + 1]
    assert choice["logprobs"]["text_offset"] == [*offsets, *after]
    assert (await complete(client, prompt=prompt, echo=True, max_tokens=2))["text"] == text + "ok"


async def test_ids_are_echoed_with_control_tokens_if_these_are_not_skipped(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = lambda request, choice: Script([], finish="length")
    fields = {"prompt": [IM_START, *ids("h")], "echo": True, "max_tokens": 0, "logprobs": 0}
    choice = await complete(client, **fields, skip_special_tokens=False)
    assert choice["text"] == "<|im_start|>h"
    assert choice["logprobs"]["text_offset"] == [0, 12]


@pytest.mark.parametrize(
    ("keep", "text", "offsets"),
    [(2, "yz", [0, 1]), (3, "éyz", [0, 1, 2]), (9, "héyz", [0, 1, 1, 2, 3])],
)
async def test_a_truncated_prompt_is_echoed_from_where_it_is_kept(
    client: httpx.AsyncClient, engine: FakeEngineClient, keep: int, text: str, offsets: list[int]
) -> None:
    engine.scripts = lambda request, choice: Script([], finish="length")
    fields = {"prompt": "héyz", "echo": True, "max_tokens": 0, "truncate_prompt_tokens": keep}
    assert (await complete(client, **fields))["text"] == text
    choice = await complete(client, **fields, logprobs=1)
    assert (choice["text"], choice["logprobs"]["text_offset"]) == (text, offsets)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_offsets_of_each_kind_of_tokenizer(
    engine: FakeEngineClient, kind: str, bos: bool, as_ids: bool
) -> None:
    tokenizer = build(kind, bos=bos)
    text = "ab a  lo é b" if kind != "wordpiece" else "ab a lo b"
    token_ids = await tokenizer.encode(text, add_special_tokens=True)
    answer = await tokenizer.encode(" ab lo", add_special_tokens=False)
    engine.scripts = lambda request, choice: Script(answer, finish="length")
    async with serve(engine, tokenizer) as client:
        choice = await complete(
            client, prompt=token_ids if as_ids else text, echo=True, logprobs=0, max_tokens=20
        )
    check_offsets(choice)
    assert choice["text"].startswith(text)
    # Where a token's own text is found in the answer, it begins at its offset.
    names, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    begin = 1 if bos else 0
    assert offsets[begin] == 0
    for number, (name, offset) in enumerate(zip(names, offsets, strict=True)):
        if name.startswith("bytes:") or name == "<s>":
            continue
        # A tokenizer may put a space before a text that the text itself does not have.
        spelt = name if number > begin or choice["text"].startswith(name) else name.lstrip(" ")
        assert choice["text"].startswith(spelt, offset), (name, offset, choice["text"])


# -- the keys of top_logprobs ----------------------------------------------------------------


def entry(token: str, logprob: float, top: list[tuple[str, float]]) -> TokenLogprobs:
    pairs = [(ids(text)[0], value) for text, value in top]
    return TokenLogprobs(
        ids(token)[0], logprob, 1, [token for token, _ in pairs], [value for _, value in pairs]
    )


@pytest.mark.parametrize(
    ("chosen", "top", "expected"),
    [
        # Not the likeliest: first nevertheless, then the others from the likeliest on.
        (("b", -2.0), [("a", -0.5), ("b", -2.0)], [("b", -2.0), ("a", -0.5)]),
        (("a", -0.5), [("a", -0.5), ("b", -2.0)], [("a", -0.5), ("b", -2.0)]),
        # Not among the likeliest.
        (("c", -7.0), [("a", -0.5), ("b", -2.0)], [("c", -7.0), ("a", -0.5), ("b", -2.0)]),
        (("c", -7.0), [], [("c", -7.0)]),
        # What JSON cannot express.
        (("c", float("-inf")), [("a", 0.0)], [("c", -9999.0), ("a", 0.0)]),
    ],
)
def test_the_chosen_token_is_the_first_key(
    chosen: tuple[str, float], top: list[tuple[str, float]], expected: list[tuple[str, float]]
) -> None:
    written = LogprobFormat(byte_tokenizer(), as_ids=False)
    found = written.completion([entry(*chosen, top)], ids(chosen[0]), len(top), [0])
    assert list(found["top_logprobs"][0].items()) == expected
    assert found["token_logprobs"] == [expected[0][1]]


def test_the_alternatives_of_a_chat_are_sorted_and_the_chosen_token_has_its_own_entry() -> None:
    written = LogprobFormat(byte_tokenizer(), as_ids=False)
    found = written.chat([entry("b", -2.0, [("a", -0.5), ("b", -2.0), ("c", -3.0)])], 2)
    [content] = found["content"]
    assert (content["token"], content["logprob"], content["bytes"]) == ("b", -2.0, [98])
    assert [(top["token"], top["logprob"]) for top in content["top_logprobs"]] == [
        ("a", -0.5),
        ("b", -2.0),
    ]


@pytest.mark.parametrize(
    ("kind", "piece", "expected"),
    [
        ("byte-level", "Ġ", b" "),
        ("byte-level", "Ã", b"\xc3"),
        ("metaspace-always", "▁ab", b" ab"),
        ("metaspace-always", "<0xC3>", b"\xc3"),
        ("metaspace-always", "</s>", b"</s>"),
        ("unigram", "▁▁", b"  "),
        ("wordpiece", "##a", b"a"),
        ("wordpiece", "a", b" a"),
    ],
)
def test_bytes_are_those_that_a_token_adds_to_the_text(
    kind: str, piece: str, expected: bytes
) -> None:
    tokenizer = build(kind)
    assert tokenizer.token_bytes(tokenizer.backend.token_to_id(piece)) == expected


# -- stop strings ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(
    ("stop", "text", "reason", "count"),
    [
        ("<|im_start|>", "one", "<|im_start|>", 4),
        ("e<|im_start|>tw", "on", "e<|im_start|>tw", 6),
        # The token that ends the answer, which is not shown either.
        ("o<|im_end|>", "onetw", "o<|im_end|>", 8),
        ("x<|im_end|>", "onetwo", None, 8),
    ],
)
async def test_a_stop_string_may_contain_control_tokens(
    client: httpx.AsyncClient,
    engine: FakeEngineClient,
    stop: str,
    text: str,
    reason: str | None,
    count: int,
    chunk: int,
) -> None:
    engine.scripts = lambda request, choice: Script(
        [*ids("one"), IM_START, *ids("two")], chunk=chunk
    )
    choice = await complete(client, prompt="p", stop=[stop], max_tokens=20)
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        text,
        "stop",
        reason,
    )
    response = await client.post(CHAT, json={**HI, "stop": [stop]})
    assert response.json()["choices"][0]["message"]["content"] == text
    assert response.json()["usage"]["completion_tokens"] == count
