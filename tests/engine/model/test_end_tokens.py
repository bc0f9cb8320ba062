"""End tokens come from config.json, generation_config.json and the tokenizer together."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from quire.engine.config import EngineConfig
from quire.engine.errors import ModelLoadError
from quire.engine.model.model_spec import read_hf_config, spec_from_hf_config

from ..models import FAMILIES, save_model
from ..worker_driver import load

ADDED = [
    {"id": 5, "content": "<|im_end|>", "special": True},
    {"id": 6, "content": "</s>", "special": True},
]


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, fields in files.items():
        text = fields if isinstance(fields, str) else json.dumps(fields)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model without weights. config.json names the end token 1 in a vocabulary of 128."""
    FAMILIES["llama"]().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 1}))
    return tmp_path


def end_tokens(folder: Path) -> tuple[int, ...]:
    config = EngineConfig(model=str(folder))
    return spec_from_hf_config(read_hf_config(config), config).eos_token_ids


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1,)),
        # A list, and a single id.
        ({"generation_config.json": {"eos_token_id": [2, 7]}}, (1, 2, 7)),
        ({"generation_config.json": {"eos_token_id": 9}}, (1, 9)),
        ({"generation_config.json": {"eos_token_id": None}}, (1,)),
        # The tokenizer's end token, as text and as an object, found in each of the three files.
        (
            {
                "tokenizer_config.json": {"eos_token": "<|im_end|>"},
                "tokenizer.json": {"version": "1", "added_tokens": ADDED, "model": {"vocab": {}}},
            },
            (1, 5),
        ),
        (
            {
                "tokenizer_config.json": {"eos_token": {"content": "</s>"}},
                "tokenizer.json": {"added_tokens": ADDED},
            },
            (1, 6),
        ),
        (
            {
                "tokenizer_config.json": {
                    "eos_token": "<|im_end|>",
                    "added_tokens_decoder": {"8": {"content": "<|im_end|>"}},
                }
            },
            (1, 8),
        ),
        (
            {
                "special_tokens_map.json": {"eos_token": "</s>"},
                "tokenizer.json": {"added_tokens": ADDED},
            },
            (1, 6),
        ),
        # All three differ.
        (
            {
                "generation_config.json": {"eos_token_id": [3]},
                "tokenizer_config.json": {"eos_token": "<|im_end|>"},
                "tokenizer.json": {"added_tokens": ADDED},
            },
            (1, 3, 5),
        ),
        # A tokenizer without an end token, or whose files do not tell its id.
        ({"tokenizer_config.json": {"eos_token": None}}, (1,)),
        ({"tokenizer_config.json": {"eos_token": "<end>"}, "tokenizer.json": {}}, (1,)),
    ],
)
def test_each_file_adds_its_end_tokens(
    folder: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    write(folder, files)
    assert end_tokens(folder) == expected


@pytest.mark.parametrize("wrong", [128, -1, "2", 2.5, True])
def test_what_is_no_id_of_the_vocabulary_is_ignored_with_a_warning(
    folder: Path, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, {"generation_config.json": {"eos_token_id": [wrong, 4]}})
    with caplog.at_level(logging.WARNING, "quire.engine"):
        assert end_tokens(folder) == (1, 4)
    [record] = [each for each in caplog.records if each.name == "quire.engine"]
    assert "generation_config.json names the end token" in record.getMessage()


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_cannot_be_read_is_named(folder: Path, name: str, text: str) -> None:
    write(folder, {name: text})
    with pytest.raises(ModelLoadError, match=name):
        end_tokens(folder)


def test_a_generation_config_that_transformers_refuses_does_not_matter(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    write(tmp_path, {"generation_config.json": {"max_new_tokens": -1, "top_k": -1, "no_such": 1}})
    assert load(tmp_path).spec.eos_token_ids
