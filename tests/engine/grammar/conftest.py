"""A tiny random model with a real tokenizer, and an engine that serves it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers.models.llama import LlamaConfig

from quire.engine.core.engine_core import EngineCore

from ..models import COMMON, build_model
from .constrained import DEMO, EOS, VOCAB_SIZE, make_core


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with random weights and the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("constrained")
    sizes = COMMON | {"vocab_size": VOCAB_SIZE, "eos_token_id": EOS, "bos_token_id": None}
    build_model(LlamaConfig(**sizes | {"max_position_embeddings": 512})).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


@pytest.fixture(scope="package")
def core(folder: Path) -> EngineCore:
    return make_core(folder, max_num_seqs=64)
