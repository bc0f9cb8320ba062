"""Beam search, bad words and fill-in-the-middle: how a body becomes a request to the engine.

One beam search runs on the real engine and is checked in the answer that a client gets.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Encoder

from quire.engine.config import EngineConfig, EngineInfo
from quire.server.text.bad_words import encode_bad_words
from quire.server.text.infill import encode_infill, infill_tokens
from quire.server.text.tokenizer import Tokenizer

from ...engine import models as tiny
from ...engine.inline_client import InlineEngineClient
from ..conftest import MakeClient, app_client, make_app
from ..fakes import VOCAB_SIZE, FakeEngineClient, byte_tokenizer, ids
from ..real_engine import make_core, running

PATHS = {
    "/v1/completions": {"prompt": "abc"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "abc"}]},
}


class WideEngineClient(FakeEngineClient):
    """A fake engine whose vocabulary has room for more control tokens."""

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, vocab_size=VOCAB_SIZE + 8)


def metaspace_tokenizer(*control: str) -> Tokenizer:
    """Make a tokenizer like Llama's, with a token for each character.

    It prepends a space and a token for the beginning of the text.
    """
    pieces = ["<unk>", "<s>", "</s>", "▁", "☺", *"abcdefgh()\n"]
    encoder = Encoder(
        models.BPE(
            vocab={piece: i for i, piece in enumerate([*pieces, "▁a"])},
            merges=[("▁", "a")],
            unk_token="<unk>",
        )
    )
    encoder.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    encoder.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    encoder.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    encoder.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>", *control)]
    )
    return Tokenizer(
        transformers.PreTrainedTokenizerFast(tokenizer_object=encoder, eos_token="</s>")
    )


def with_control(*names: str) -> Tokenizer:
    """Return the byte tokenizer with more control tokens, from id 258 on."""
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


@pytest.mark.parametrize("path", PATHS)
async def test_a_beam_search_reaches_the_engine(
    make_client: MakeClient, engine: FakeEngineClient, tmp_path: Path, path: str
) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.2}'
    )
    client = make_client(generation_config=str(tmp_path))
    fields = {
        **PATHS[path], "use_beam_search": True, "n": 2, "best_of": 4, "length_penalty": 0.5,
        "early_stopping": "never", "max_tokens": 5, "min_tokens": 2, "stop_token_ids": [7],
        "temperature": 0,
    }  # fmt: skip
    response = await client.post(path, json=fields)
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"]) == 2
    params = engine.requests[0].sampling_params
    assert (params.n, params.beam_width, params.length_penalty) == (2, 4, 0.5)
    assert (params.early_stopping, params.min_tokens, params.stop_token_ids) == ("never", 2, (7,))
    assert (params.temperature, params.repetition_penalty, params.logprobs) == (0.0, 1.0, None)
    await client.post(path, json={**PATHS[path], "use_beam_search": True, "n": 3})
    params = engine.requests[1].sampling_params
    assert (params.beam_width, params.length_penalty, params.early_stopping) == (3, 1.0, False)


async def test_default_max_tokens_leaves_room_for_every_beam(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    engine.num_blocks = 20
    response = await make_client().post(
        "/v1/chat/completions",
        json={**PATHS["/v1/chat/completions"], "use_beam_search": True, "n": 4},
    )
    assert response.status_code == 200, response.text
    [request] = engine.requests
    shared = len(request.prompt_token_ids) // 16
    room = (shared + (20 - shared) // 4) * 16 - len(request.prompt_token_ids) + 1
    assert request.sampling_params.max_tokens == room
    response = await make_client().post(
        "/v1/chat/completions",
        json={
            **PATHS["/v1/chat/completions"],
            "use_beam_search": True,
            "n": 4,
            "max_tokens": room + 1,
        },
    )
    assert response.json()["error"]["code"] == "kv_pool_too_small"


async def test_the_real_engine_returns_the_best_beams_first(tmp_path: Path) -> None:
    """Choices come in the order of their scores, each token with its log-probability."""
    config = tiny.LlamaConfig(**tiny.COMMON | {"vocab_size": VOCAB_SIZE})
    tiny.build_model(config).save_pretrained(tmp_path)
    engine_config = EngineConfig(
        model=str(tmp_path), device="cpu", num_blocks=64, max_num_seqs=8, num_threads=1
    )
    engine = InlineEngineClient(engine_config, make_core)
    async with running(make_app(engine, byte_tokenizer()), engine) as http:
        response = await http.post(
            "/v1/completions",
            json={
                **PATHS["/v1/completions"],
                "use_beam_search": True,
                "n": 3,
                "best_of": 4,
                "length_penalty": 0.5,
                "max_tokens": 12,
                "logprobs": 1,
                "return_token_ids": True,
                "echo": True,
                "stop_token_ids": list(range(40, 90)),
            },  # fmt: skip
        )
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert len(choices) == 3
    scores = []
    for choice in choices:
        logprobs = choice["logprobs"]["token_logprobs"][3:]
        assert len(logprobs) == len(choice["token_ids"])
        scores.append(sum(logprobs) / len(logprobs) ** 0.5)
        last = choice["token_ids"][-1]
        assert (choice["finish_reason"] == "stop") == (40 <= last < 90 or last == 2)
        assert choice["stop_reason"] == (last if 40 <= last < 90 else None)
    assert scores == sorted(scores, reverse=True)
    assert "stop" in {choice["finish_reason"] for choice in choices}
    usage = response.json()["usage"]
    assert usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in choices)


async def test_bad_words_reach_the_engine_with_and_without_a_space(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    for path, fields in PATHS.items():
        response = await make_client().post(path, json={**fields, "bad_words": ["ab", " c", "ab"]})
        assert response.status_code == 200, response.text
    for request in engine.requests:
        # This tokenizer spells a word in the same way after a space.
        assert request.sampling_params.bad_words == (tuple(ids("ab")), tuple(ids("c")))


async def test_bad_words_include_their_spelling_after_a_space() -> None:
    tokenizer = metaspace_tokenizer()
    space, word = (tokenizer.backend.token_to_id(piece) for piece in ("▁", "▁a"))
    b = tokenizer.backend.token_to_id("b")
    # "▁▁ab" ends with the tokens of "▁ab".
    assert await encode_bad_words(tokenizer, ["ab"]) == ((word, b),)
    assert await encode_bad_words(tokenizer, ["b"]) == ((space, b),)


FAMILIES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "qwen": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", ("<|endoftext|>",)),
    "codegemma": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", ("<|file_separator|>",)),
    "starcoder": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<|endoftext|>",)),
    "santacoder": ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ()),
    "deepseek": ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ()),
}


@pytest.mark.parametrize("family", FAMILIES)
async def test_infill_prompts_have_the_format_of_the_model_family(
    engine: FakeEngineClient, family: str
) -> None:
    *names, ends = FAMILIES[family]
    tokenizer = with_control(*map(str, names), *ends)
    app = make_app(engine, tokenizer)
    marks = [tokenizer.backend.token_to_id(str(name)) for name in names]
    end_ids = tuple(tokenizer.backend.token_to_id(name) for name in ends)
    tokens = infill_tokens(tokenizer)
    assert [tokens.prefix, tokens.suffix, tokens.middle] == marks and tokens.ends == end_ids
    assert await encode_infill(tokenizer, "a b", " c", add_special_tokens=True) == [
        marks[0], *ids("a b"), marks[1], *ids(" c"), marks[2],
    ]  # fmt: skip
    async with app_client(app) as http:
        for fields in ({"echo": True}, {"truncate_prompt_tokens": 3}, {"prompt": [1, 2]}):
            body = {**PATHS["/v1/completions"], "suffix": "c", **fields}
            response = await http.post("/v1/completions", json=body)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "suffix"
    assert not engine.requests


async def test_a_suffix_reaches_the_engine() -> None:
    engine = WideEngineClient()
    tokenizer = with_control("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>")
    prefix, suffix, middle, end = range(VOCAB_SIZE, VOCAB_SIZE + 4)
    async with app_client(make_app(engine, tokenizer)) as http:
        fields: dict[str, Any]
        for fields in ({}, {"ignore_eos": True}):
            body = {"prompt": ["ab", "c"], "suffix": "de", "stop_token_ids": [9], **fields}
            response = await http.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
    first, second, third, _ = engine.requests
    assert first.prompt_token_ids == (prefix, *ids("ab"), suffix, *ids("de"), middle)
    assert second.prompt_token_ids == (prefix, *ids("c"), suffix, *ids("de"), middle)
    assert first.sampling_params.stop_token_ids == (9, end)
    assert third.sampling_params.stop_token_ids == (9,)


async def test_codellama_infill_has_a_bos_token_and_no_space_before_the_suffix() -> None:
    tokenizer = metaspace_tokenizer("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
    find = tokenizer.backend.token_to_id
    assert infill_tokens(tokenizer).ends == (find("▁<EOT>"),)
    wanted = ["<s>", "▁<PRE>", "▁a", "b", "▁<SUF>", "c", "▁", "d", "▁<MID>"]
    found = await encode_infill(tokenizer, "ab", "c d", add_special_tokens=True)
    assert [tokenizer.backend.id_to_token(token_id) for token_id in found] == wanted
    found = await encode_infill(tokenizer, "ab", "c d", add_special_tokens=False)
    assert [tokenizer.backend.id_to_token(token_id) for token_id in found] == wanted[1:]
