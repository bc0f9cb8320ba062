"""What one key's prompts tell another key, with a real engine: nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers.models.llama import LlamaConfig

from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.runner.worker import Worker
from quire.server.metrics.metrics import Metrics
from quire.server.serving.app import create_app
from quire.server.settings import Settings
from quire.server.text.tokenizer import Tokenizer

from ...engine.inline_client import InlineEngineClient
from ...engine.models import COMMON, build_model
from ..conftest import MODEL
from ..fakes import byte_tokenizer
from ..openai_http import COMPLETIONS

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
    values = Settings(
        model=str(folder),
        served_model_name=(MODEL,),
        api_key=("sk-a", "sk-b"),
        prefix_cache_isolation=isolation,
        device="cpu",
        dtype="float32",
        num_gpu_blocks_override=100,
        num_threads=1,
    )

    def make_core(config: EngineConfig) -> EngineCore:
        return EngineCore(config, Worker(config))

    metrics = Metrics(MODEL)
    engine = InlineEngineClient(values.engine_config(), make_core, observer=metrics)
    app = create_app(values, engine, Tokenizer.load(str(folder)), metrics)
    await engine.start()
    try:
        await engine.wait_ready()
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://quire") as client:
            found = await _found(client)
    finally:
        await engine.close()
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
