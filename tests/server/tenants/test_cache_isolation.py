"""What one key's prompts tell another key, with a real engine: nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers.models.llama import LlamaConfig

from ...engine.models import COMMON, build_model
from ..fakes import byte_tokenizer
from ..openai_http import COMPLETIONS
from ..real_engine import real_server, running

PROMPT = [5 + 7 * i % 120 for i in range(70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    build_model(LlamaConfig(**COMMON | {"vocab_size": 258})).save_pretrained(path)
    byte_tokenizer()._hf.save_pretrained(path)
    return path


@pytest.mark.parametrize("isolation", [None, "none"])
async def test_a_key_finds_its_own_prompts_in_the_cache_and_no_others(
    folder: Path, isolation: str | None
) -> None:
    """(Drafts are found in the same index, under the same salt.)"""
    server = real_server(
        folder,
        api_key=("sk-a", "sk-b"),
        prefix_cache_isolation=isolation,
        num_gpu_blocks_override=100,
    )
    async with running(server.app, server.engine) as client:
        found = await _found(client)
    all_cached = len(PROMPT) - 1
    assert found[0] == 0 and min(found[2:]) >= all_cached
    if isolation is None:
        assert found[1] == 0
    else:
        assert found[1] >= all_cached


async def _found(client: httpx.AsyncClient) -> list[int]:
    """Return the cached tokens of the same request by one key after the other."""
    found, answers = [], set()
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    for key in ("sk-a", "sk-b", "sk-a", "sk-b"):
        headers = {"authorization": f"Bearer {key}"}
        response = await client.post(COMPLETIONS, json=fields, headers=headers)
        assert response.status_code == 200, response.text
        answer = response.json()
        answers.add(answer["choices"][0]["text"])
        found.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert len(answers) == 1
    return found
