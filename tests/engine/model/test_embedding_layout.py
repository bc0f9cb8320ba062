"""Test reading sentence-transformers' layout, and weights without a language-model head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from quire.engine.embedding_spec import NO_LAYOUT, EmbeddingSpec
from quire.engine.errors import ModelLoadError, UnsupportedModelError
from quire.engine.model.embedding_layout import read_embedding
from quire.engine.model.model_spec import read_hf_config, spec_from_hf_config

from ..models import FAMILIES, build_model
from ..sentence_transformers_layout import add_layout, edit_json
from ..worker_driver import load, make_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FAMILIES["qwen3"]().save_pretrained(tmp_path)
    return tmp_path


def read(folder: Path, **config: Any) -> EmbeddingSpec | str:
    engine_config = make_config(folder, **config)
    return read_embedding(read_hf_config(engine_config), engine_config)


@pytest.mark.parametrize("newest", [False, True])
@pytest.mark.parametrize(
    ("mode", "pooling"),
    [("lasttoken", "last"), ("mean", "mean"), ("weightedmean", "weightedmean"), ("max", "max")],
)
def test_poolings_are_read(folder: Path, mode: str, pooling: str, newest: bool) -> None:
    add_layout(folder, mode, normalize=newest, newest=newest)
    assert read(folder) == EmbeddingSpec(pooling=pooling, normalize=newest, size=32)  # type: ignore[arg-type]


def test_the_prompt_and_matryoshka_dimensions_are_read(folder: Path) -> None:
    add_layout(folder, "lasttoken")
    edit_json(folder / "config.json", matryoshka_dimensions=[8, 16])
    prompts = {"query": "Query: ", "document": ""}
    edit_json(
        folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="query"
    )
    spec = read(folder)
    assert isinstance(spec, EmbeddingSpec)
    assert (spec.prompt, spec.is_matryoshka) == ("Query: ", True)
    assert spec.matryoshka_dimensions == (8, 16)
    edit_json(folder / "config_sentence_transformers.json", default_prompt_name=None)
    edit_json(folder / "config.json", matryoshka_dimensions=None, is_matryoshka=True)
    assert read(folder) == EmbeddingSpec(
        pooling="last", normalize=True, size=32, is_matryoshka=True
    )


def test_a_folder_without_the_layout_needs_a_configured_pooling(folder: Path) -> None:
    assert read(folder) == NO_LAYOUT
    assert read(folder, pooling="mean") == EmbeddingSpec(pooling="mean", normalize=True, size=32)


@pytest.mark.parametrize("mode", ["cls", "mean_sqrt_len_tokens"])
def test_unsupported_poolings(folder: Path, mode: str) -> None:
    add_layout(folder, mode)
    assert read(folder) == f"pooling by {mode} is not supported"
    assert isinstance(read(folder, pooling="last"), EmbeddingSpec)


@pytest.mark.parametrize(
    ("file", "fields", "reason"),
    [
        (
            "1_Pooling/config.json",
            {"pooling_mode_max_tokens": True},
            "pooling by max and lasttoken",
        ),
        ("sentence_bert_config.json", {"do_lower_case": True}, "lower-cases"),
        ("config.json", {"auto_map": {"AutoModel": "modeling.Model"}}, "code of its own"),
    ],
)
def test_unsupported_settings(folder: Path, file: str, fields: dict[str, Any], reason: str) -> None:
    add_layout(folder, "lasttoken")
    edit_json(folder / file, **fields)
    answer = read(folder)
    assert isinstance(answer, str)
    assert reason in answer


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ({"path": "2_Dense", "type": "sentence_transformers.models.Dense"}, "Pooling, Dense"),
        ({"path": "2_Normalize", "type": "own_code.Normalize"}, "code of its own"),
    ],
)
def test_unsupported_modules(folder: Path, module: dict[str, Any], reason: str) -> None:
    add_layout(folder, "lasttoken", normalize=False)
    path = folder / "modules.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), module]))
    answer = read(folder)
    assert isinstance(answer, str)
    assert reason in answer


def test_excluding_the_prompt_from_pooling_is_unsupported(folder: Path) -> None:
    add_layout(folder, "mean")
    edit_json(folder / "1_Pooling/config.json", include_prompt=False)
    assert isinstance(read(folder), EmbeddingSpec)  # no prompt, nothing to leave out
    file = folder / "config_sentence_transformers.json"
    edit_json(file, prompts={"q": "Query: "}, default_prompt_name="q")
    assert read(folder) == "its prompt is left out of the pooling"


def test_missing_and_broken_files(folder: Path) -> None:
    add_layout(folder, "lasttoken")
    (folder / "1_Pooling/config.json").unlink()
    assert read(folder) == "1_Pooling/config.json is missing"
    for text in ("{", "[1]", '{"a": 1}'):
        (folder / "modules.json").write_text(text)
        with pytest.raises(ModelLoadError, match="sentence-transformers layout"):
            read(folder)


def test_a_model_with_bidirectional_attention_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", is_causal=False)
    config = make_config(folder)
    with pytest.raises(UnsupportedModelError, match="later ones"):
        spec_from_hf_config(read_hf_config(config), config)


@pytest.mark.parametrize(("family", "can_generate"), [("qwen3", True), ("mistral", False)])
def test_weights_without_head_and_name_prefix_are_loaded(
    tmp_path: Path, family: str, can_generate: bool
) -> None:
    """Weights without head and name prefix load, as in Qwen3-Embedding (tied head) and
    E5-Mistral."""
    model = build_model(FAMILIES[family]())
    model.base_model.save_pretrained(tmp_path)
    if not can_generate:  # a model that makes no embeddings either is useless
        with pytest.raises(ModelLoadError, match=r"1 missing keys, the first lm_head\.weight"):
            load(tmp_path)
    add_layout(tmp_path, "lasttoken")
    loaded = load(tmp_path)
    assert loaded.can_generate == can_generate
    reference = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(reference.embed_tokens.weight, model.base_model.embed_tokens.weight)
    edit_json(tmp_path / "config.json", num_hidden_layers=3, layer_types=None)
    with pytest.raises(ModelLoadError, match=r"missing keys, the first model\.layers\.2"):
        load(tmp_path)
