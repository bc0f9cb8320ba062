from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from quire.engine.errors import ConfigurationError, InvalidRequestError, ModelLoadError
from quire.server.text.tokenizer import Tokenizer

from ..conftest import MakeClient
from ..fakes import IM_END, IM_START, VOCAB_SIZE, byte_tokenizer, ids
from ..openai_http import assert_error


async def test_a_prompt_is_tokenised_and_detokenised(client: httpx.AsyncClient) -> None:
    response = await client.post(
        "/tokenize", json={"model": "tiny", "prompt": "é<|im_end|>", "return_token_strs": True}
    )
    expected = [*ids("é"), IM_END]
    assert response.json() == {
        "count": 3,
        "max_model_len": 512,
        "tokens": expected,
        "token_strs": ["Ã", "©", "<|im_end|>"],
    }
    response = await client.post("/detokenize", json={"tokens": expected})
    assert response.json() == {"prompt": "é<|im_end|>"}


async def test_a_chat_is_tokenised_as_the_chat_endpoint_does(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "x<|im_end|>"}]
    response = await client.post("/tokenize", json={"messages": messages})
    tokens = response.json()["tokens"]
    assert tokens[:6] == [IM_START, *ids("user\n")]
    assert tokens.count(IM_END) == 1


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
    ],
)
async def test_bad_fields_are_named(
    client: httpx.AsyncClient, path: str, fields: dict[str, object], param: str
) -> None:
    assert_error(await client.post(path, json=fields), 400, "invalid_value", param)


async def test_tokenizer_info(client: httpx.AsyncClient) -> None:
    info = (await client.get("/tokenizer_info")).json()
    assert info["vocab_size"] == VOCAB_SIZE
    assert info["eos_token_id"] == IM_END
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("<|im_end|>", None, None)
    assert "<|im_start|>" in info["chat_template"]


async def test_tokenising_a_long_prompt_does_not_block_the_event_loop(tokenizer: Tokenizer) -> None:
    work = asyncio.create_task(tokenizer.encode("a" * 1_000_000, add_special_tokens=False))
    longest, last = 0.0, time.perf_counter()
    while not work.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert len(await work) == 1_000_000
    # If tokenising held the interpreter lock, the lag would be over a second.
    assert longest < 0.5


async def test_a_trusted_server_accepts_a_chat_template(make_client: MakeClient) -> None:
    client = make_client(trust_request_chat_template=True)
    fields = {"messages": [{"role": "user", "content": "x"}]}
    response = await client.post(
        "/tokenize", json={**fields, "chat_template": "[{{ messages[0].content }}]"}
    )
    assert response.json()["tokens"] == ids("[x]")
    for template in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{% if %}",
                     "{{ raise_exception('no') }}", "{{ 1 // 0 }}"):  # fmt: skip
        response = await client.post("/tokenize", json={**fields, "chat_template": template})
        assert response.status_code == 400, template


async def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        await byte_tokenizer(None).encode_chat(
            [{"role": "user", "content": "x"}], add_generation_prompt=True
        )


def test_a_missing_tokenizer_is_reported(tmp_path: object) -> None:
    with pytest.raises(ModelLoadError, match="cannot load the tokenizer"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(ModelLoadError, match="there is no folder .*/nothing"):
        Tokenizer.load(f"{tmp_path}/nothing")


def test_a_missing_template_file_is_reported(tmp_path: object) -> None:
    tokenizer = byte_tokenizer()
    tokenizer._hf.save_pretrained(str(tmp_path))
    with pytest.raises(ConfigurationError, match="cannot read the template"):
        Tokenizer.load(str(tmp_path), chat_template=f"{tmp_path}/missing.jinja")
    loaded = Tokenizer.load(str(tmp_path), chat_template="{{ 'x' }}")
    assert loaded.vocab_size == VOCAB_SIZE
    assert loaded.info()["chat_template"] == "{{ 'x' }}"
