"""A tiny embedding model for the tests of /v1/embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import processors
from transformers.models.qwen3 import Qwen3Config

from ...engine.models import COMMON, build_model
from ...engine.sentence_transformers_layout import add_layout, edit_json
from ..fakes import IM_END, byte_tokenizer


@pytest.fixture(scope="session")
def embedding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model like Qwen3-Embedding: no head, no prompt prefix, and <|im_end|> after a text."""
    path = tmp_path_factory.mktemp("embedding")
    config = Qwen3Config(**COMMON | {"vocab_size": 258}, head_dim=16, tie_word_embeddings=True)
    build_model(config).base_model.save_pretrained(path)
    edit_json(path / "config.json", architectures=["Qwen3ForCausalLM"], is_matryoshka=True)
    hf = byte_tokenizer()._hf
    hf.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", IM_END)]
    )
    hf.save_pretrained(path)
    add_layout(path, "lasttoken")
    return path
