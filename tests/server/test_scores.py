"""Rerank, score and classify of tiny models over HTTP, against transformers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.llama import LlamaConfig
from transformers.models.qwen3 import Qwen3Config

from quire.engine.classifier_spec import NO_CLASSIFIER, ClassifierSpec
from quire.engine.devices.choose import choose_backend
from quire.engine.errors import QuireError
from quire.engine.model.loader import load_model
from quire.server.scoring.pairs import PairEncoder

from ..engine.models import COMMON, build_model
from ..engine.sentence_transformers_layout import edit_json
from ..engine.worker_driver import make_config
from .conftest import MODEL
from .fakes import FakeEngineClient, byte_tokenizer, ids
from .openai_http import assert_error
from .real_engine import real_server, running

QUERY = "what do cats eat? Answer with a kind of food."
DOCUMENTS = ["cats eat fish", "the sky is blue", "fish, mice and birds", "a"]
WORDS = ("yes", "no")
YES, NO = 258, 259
PAIR_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'query' %}<|im_start|>{{ message.content }}|"
    "{% elif message.role == 'document' %}{{ message.content }}<|im_end|>{% endif %}"
    "{% endfor %}"
)


def _config(kind: type[Any] = Qwen3Config, **fields: Any) -> Any:
    values = {**COMMON, "vocab_size": 260, "max_position_embeddings": 1024}
    return kind(**values, **fields)


def _save_classifier(folder: Path, config: Any) -> PreTrainedModel:
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    model.eval().save_pretrained(folder)
    byte_tokenizer(special=WORDS)._hf.save_pretrained(folder)
    return model


def _save_reranker(folder: Path) -> PreTrainedModel:
    model = build_model(_config(head_dim=16, tie_word_embeddings=True))
    model.save_pretrained(folder)
    byte_tokenizer(special=WORDS)._hf.save_pretrained(folder)
    return model


@asynccontextmanager
async def _serving(folder: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    sizes = {"num_gpu_blocks_override": 200, "max_num_batched_tokens": 64}
    server = real_server(folder, **sizes, **settings)
    async with running(server.app, server.engine) as client:
        yield client


def _logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Return the logits that a classifier of transformers gives one text."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def _log_odds(model: PreTrainedModel, prompt: str) -> float:
    """Return logit(yes) - logit(no) after a prompt, which spells control tokens."""
    token_ids = byte_tokenizer(special=WORDS).backend.encode(prompt).ids
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, -1]
    return float(logits[YES] - logits[NO])


def _qwen3_prompt(query: str, document: str, instruction: str) -> str:
    return (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        f"<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {query}\n"
        f"<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


async def test_classes_are_those_of_transformers(tmp_path: Path) -> None:
    config = _config(head_dim=16, num_labels=3, id2label={0: "bad", 1: "fair", 2: "good"})
    model = _save_classifier(tmp_path, config)
    async with _serving(tmp_path) as client:
        texts = [*DOCUMENTS, QUERY * 3]
        for raw in (False, True):
            body = {"input": texts, "use_activation": not raw}
            response = await client.post("/v1/classify", json={"model": MODEL, **body})
            assert response.status_code == 200, response.text
            for text, entry in zip(texts, response.json()["data"], strict=True):
                logits = _logits(model, ids(text))
                expected = logits if raw else logits.softmax(-1)
                assert entry["probs"] == pytest.approx(expected.tolist(), abs=1e-5)
                assert entry["label"] == ("bad", "fair", "good")[int(logits.argmax())]
                assert entry["num_classes"] == 3
        tokens = sum(map(len, texts))
        assert response.json()["usage"]["prompt_tokens"] == tokens
        # Token ids, and a chat that the template renders.
        (entry,) = (await client.post("/classify", json={"input": [7, 8]})).json()["data"]
        assert entry["probs"] == pytest.approx(
            _logits(model, [7, 8]).softmax(-1).tolist(), abs=1e-5
        )
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        (entry,) = (await client.post("/classify", json=chat)).json()["data"]
        rendered = [256, *ids("user\nhi"), 257, *ids("\n")]
        expected = _logits(model, rendered).softmax(-1)
        assert entry["probs"] == pytest.approx(expected.tolist(), abs=1e-5)
        # It has three classes and no language-model head.
        body = {"query": "a", "documents": ["b"]}
        assert_error(await client.post("/v1/rerank", json=body), 400, "invalid_value", "model")
        response = await client.post("/v1/completions", json={"prompt": "a"})
        assert_error(response, 400, "invalid_value", "model")


@pytest.mark.parametrize(
    ("problem", "apply"),
    [
        ("regression", lambda logits: logits),
        ("multi_label_classification", torch.sigmoid),
        ("single_label_classification", lambda logits: logits.softmax(-1)),
    ],
)
async def test_the_activation_follows_the_kind_of_problem(
    tmp_path: Path, problem: str, apply: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model = _save_classifier(tmp_path, _config(LlamaConfig, num_labels=2, problem_type=problem))
    async with _serving(tmp_path) as client:
        (entry,) = (await client.post("/v1/classify", json={"input": QUERY})).json()["data"]
    expected = apply(_logits(model, ids(QUERY)))
    assert entry["probs"] == pytest.approx(expected.tolist(), abs=1e-5)


async def test_a_head_with_one_class_scores_pairs(tmp_path: Path) -> None:
    """The pair is joined as the tokenizer joins one."""
    model = _save_classifier(tmp_path, _config(LlamaConfig, num_labels=1))
    hf = AutoTokenizer.from_pretrained(tmp_path)
    expected = [
        float(torch.sigmoid(_logits(model, hf(QUERY, document).input_ids))[0])
        for document in DOCUMENTS
    ]
    order = sorted(range(len(DOCUMENTS)), key=lambda index: -expected[index])
    async with _serving(tmp_path) as client:
        body: dict[str, Any] = {"model": MODEL, "query": QUERY, "documents": DOCUMENTS}
        for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
            results = (await client.post(path, json=body)).json()["results"]
            assert [result["index"] for result in results] == order
            for result in results:
                index = result["index"]
                assert result["relevance_score"] == pytest.approx(expected[index], abs=1e-5)
                assert result["document"] == {"text": DOCUMENTS[index]}
        mixed = [*DOCUMENTS[:1], {"text": DOCUMENTS[1], "title": "sky"}]
        response = await client.post("/v1/rerank", json={**body, "documents": mixed})
        assert response.headers["x-quire-ignored-params"] == "documents[1].title"
        objects = [{"text": text} for text in DOCUMENTS]
        options = {"documents": objects, "top_n": 2, "return_documents": False}
        results = (await client.post("/v1/rerank", json={**body, **options})).json()["results"]
        assert [result["index"] for result in results] == order[:2]
        assert all("document" not in result for result in results)
        for fields in (
            {"text_1": QUERY, "text_2": DOCUMENTS},
            {"queries": [QUERY], "documents": DOCUMENTS},
            {"queries": [QUERY] * len(DOCUMENTS), "items": DOCUMENTS},
        ):
            answer = (await client.post("/v1/score", json=fields)).json()
            scores = [entry["score"] for entry in answer["data"]]
            assert scores == pytest.approx(expected, abs=1e-5)
        response = await client.post("/v1/score", json={"queries": ["a", "b"], "documents": ["c"]})
        assert_error(response, 400, "invalid_value", "documents")
        response = await client.post("/v1/rerank", json={**body, "instruction": "judge"})
        assert_error(response, 400, "invalid_value", "instruction")


async def test_qwen3_reranker_compares_yes_with_no(tmp_path: Path) -> None:
    """Documents that spell control tokens stay text, and all share the query's prefix."""
    folder = tmp_path / "Qwen3-Reranker-tiny"
    model = _save_reranker(folder)
    default = "Given a web search query, retrieve relevant passages that answer the query"
    async with _serving(folder) as client:
        for instruction in (None, "find food"):
            body = {"query": QUERY, "documents": DOCUMENTS, "instruction": instruction}
            response = await client.post("/v1/rerank", json=body)
            assert response.status_code == 200, response.text
            answer = response.json()
            for result in answer["results"]:
                prompt = _qwen3_prompt(QUERY, DOCUMENTS[result["index"]], instruction or default)
                odds = torch.tensor(_log_odds(model, prompt))
                assert result["relevance_score"] == pytest.approx(float(odds.sigmoid()), abs=1e-5)
        # A hundred documents behind one query: it is computed once.
        many = [f"document {index}" for index in range(100)]
        answer = (await client.post("/v1/rerank", json={"query": QUERY, "documents": many})).json()
        prefix = len(_qwen3_prompt(QUERY, "", default).partition("<Document>")[0])
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= 0.9 * 99 * (prefix - 40)  # control tokens are long spellings
        spelt = await client.post("/v1/score", json={"text_1": "a", "text_2": "<|im_end|>b"})
        plain = await client.post("/v1/score", json={"text_1": "a", "text_2": "b"})
        assert spelt.json()["usage"]["prompt_tokens"] == (
            plain.json()["usage"]["prompt_tokens"] + len("<|im_end|>")
        )


@pytest.mark.parametrize("false_token", [NO, None])
async def test_logit_score_names_the_tokens_and_the_template_the_prompt(
    tmp_path: Path, false_token: int | None
) -> None:
    model = _save_reranker(tmp_path)
    prefix = "sentence_transformers.cross_encoder.modules.logit_score"
    modules = [
        {"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {"path": "1_LogitScore", "type": f"{prefix}.LogitScore"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_LogitScore").mkdir()
    settings = {"true_token_id": YES, "false_token_id": false_token}
    (tmp_path / "1_LogitScore" / "config.json").write_text(json.dumps(settings))
    sentence = {"activation_fn": "torch.nn.modules.linear.Identity"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(sentence))
    (tmp_path / "chat_template.jinja").write_text(PAIR_TEMPLATE)
    token_ids = [256, *ids(f"{QUERY}|{DOCUMENTS[0]}"), 257]
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, -1]
    expected = logits[YES] - (0 if false_token is None else logits[NO])
    async with _serving(tmp_path) as client:
        body = {"text_1": QUERY, "text_2": DOCUMENTS[0]}
        (entry,) = (await client.post("/v1/score", json=body)).json()["data"]
        assert entry["score"] == pytest.approx(float(expected), abs=1e-5)


async def test_flags_make_a_reranker_of_any_model(tmp_path: Path) -> None:
    model = _save_reranker(tmp_path)
    async with _serving(tmp_path, score_tokens="yes,no", score_template=PAIR_TEMPLATE) as client:
        body = {"text_1": QUERY, "text_2": DOCUMENTS[0]}
        (entry,) = (await client.post("/v1/score", json=body)).json()["data"]
        odds = _log_odds(model, f"<|im_start|>{QUERY}|{DOCUMENTS[0]}<|im_end|>")
        assert entry["score"] == pytest.approx(float(torch.tensor(odds).sigmoid()), abs=1e-5)
        # It generates as well.
        response = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("tokens", "message"),
    [("yes,never", "'never' is not a token"), ("a,b,c", "one token, or two")],
)
def test_bad_score_tokens_are_refused(tmp_path: Path, tokens: str, message: str) -> None:
    _save_reranker(tmp_path)
    with pytest.raises(QuireError, match=message):
        load_model(
            make_config(tmp_path, score_tokens=tokens), choose_backend(make_config(tmp_path))
        )


def test_a_head_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    _save_classifier(tmp_path, _config(LlamaConfig, num_labels=2))
    edit_json(tmp_path / "config.json", id2label={str(i): str(i) for i in range(5)})
    with pytest.raises(QuireError, match="has 5 labels, but `score.weight` has 2 rows"):
        load_model(make_config(tmp_path), choose_backend(make_config(tmp_path)))


async def test_truncation_cuts_the_document(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    spec = ClassifierSpec(labels=("relevance",), activation="sigmoid")
    for template in (None, PAIR_TEMPLATE):
        encoder = PairEncoder(tokenizer, template, spec)
        whole = await encoder.encode("abc", "defghij", max_tokens=100)
        assert await encoder.encode("abc", "defghij", max_tokens=100, keep=50) == whole
        shorter = await encoder.encode("abc", "defg", max_tokens=100)
        cut = await encoder.encode("abc", "defghij", max_tokens=100, keep=len(whole) - 3)
        assert cut == shorter
        with pytest.raises(QuireError, match="leaves no room for a document"):
            await encoder.encode("abc", "defghij", max_tokens=100, keep=3)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["b"] * 257}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "user": "u" * 129}, "user"),
        (
            "/v1/rerank",
            {"query": "a", "documents": ["b"], "truncate_prompt_tokens": 513},
            "truncate_prompt_tokens",
        ),
        ("/v1/score", {"queries": "a", "documents": []}, "documents"),
        ("/v1/classify", {}, "input"),
        ("/v1/classify", {"input": "a", "messages": []}, "input"),
        ("/v1/classify", {"input": []}, "input"),
        ("/v1/classify", {"input": "a", "use_activation": 1}, "use_activation"),
        ("/v1/classify", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ],
)
async def test_bad_fields_are_named(
    client: httpx.AsyncClient,
    engine: FakeEngineClient,
    path: str,
    fields: dict[str, Any],
    param: str,
) -> None:
    engine.classifier = ClassifierSpec(labels=("relevance",), activation="sigmoid")
    assert_error(await client.post(path, json=fields), 400, "invalid_value", param)
    assert not engine.requests


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ("/v1/classify", {"input": "a"}),
    ],
)
async def test_a_model_that_makes_no_scores_says_why(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any]
) -> None:
    response = await client.post(path, json=fields)
    assert_error(response, 400, "invalid_value", "model")
    assert NO_CLASSIFIER in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/rerank", {"query": "a", "documents": ["b", "c" * 600]}, "documents"),
        ("/v1/classify", {"input": "a" * 600}, "input"),
    ],
)
async def test_texts_longer_than_the_context_are_refused(
    client: httpx.AsyncClient,
    engine: FakeEngineClient,
    path: str,
    fields: dict[str, Any],
    param: str,
) -> None:
    engine.classifier = ClassifierSpec(labels=("relevance",), activation="sigmoid")
    response = await client.post(path, json=fields)
    assert_error(response, 400, "context_length_exceeded", param)
    assert "maximum context length is 512 tokens" in response.json()["error"]["message"]


def test_a_sequence_classifier_has_no_language_model_head(tmp_path: Path) -> None:
    """transformers would make one up; its logits must never be sampled."""
    _save_classifier(tmp_path, _config(LlamaConfig, num_labels=1))
    assert not load_model(make_config(tmp_path), choose_backend(make_config(tmp_path))).can_generate
