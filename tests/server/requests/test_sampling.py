from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.engine.errors import ConfigurationError
from quire.server.serving.generation_defaults import load_generation_defaults

from ..conftest import MakeClient
from ..fakes import FakeEngineClient, ids
from ..openai_http import CHAT, COMPLETIONS, HI, PROMPT, assert_error


def _config(folder: Path, **fields: Any) -> str:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return str(folder)


async def test_defaults_come_from_request_then_model_then_table(
    make_client: MakeClient, engine: FakeEngineClient, tmp_path: Path
) -> None:
    folder = _config(tmp_path, temperature=0.6, top_k=50, top_p=0.9, do_sample=True)
    client = make_client(generation_config=folder)
    await client.post(COMPLETIONS, json={**PROMPT, "temperature": 0.1, "top_k": -1, "top_p": None})
    params = engine.requests[0].sampling_params
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.1, 0, 0.9, 0.0)
    assert params.repetition_penalty == 1.0


@pytest.mark.parametrize("source", ["auto", "folder", "file"])
def test_sources_of_defaults(tmp_path: Path, source: str) -> None:
    folder = _config(tmp_path, top_k=50, max_new_tokens=7, eos_token_id=2)
    expected = {"top_k": 50, "max_new_tokens": 7}
    if source == "auto":
        assert load_generation_defaults("auto", folder) == expected
        assert load_generation_defaults("auto", None) == {}
    else:
        path = folder if source == "folder" else f"{folder}/generation_config.json"
        assert load_generation_defaults(path, "elsewhere") == expected


def test_a_model_without_a_file_has_no_defaults(tmp_path: Path) -> None:
    assert load_generation_defaults("auto", str(tmp_path)) == {}
    assert load_generation_defaults("none", _config(tmp_path, top_k=50)) == {}


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_bad_file_is_reported_at_the_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigurationError, match="generation_config"):
        load_generation_defaults("auto", str(tmp_path))
    with pytest.raises(ConfigurationError, match="generation_config"):
        load_generation_defaults(str(tmp_path / "missing"), str(tmp_path))


async def test_every_parameter_reaches_the_engine(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    fields = {
        "max_completion_tokens": 9, "min_tokens": 2, "n": 2, "temperature": 0.5, "top_p": 0.5,
        "top_k": 5, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "logit_bias": {"5": -100, "7": 3.5},
        "allowed_token_ids": [1, 2], "seed": -3, "ignore_eos": True, "stop_token_ids": [9],
        "logprobs": True, "top_logprobs": 4, "prompt_logprobs": 1,
    }  # fmt: skip
    extras = {"priority": -5, "cache_salt": "salt", "user": "me", "timeout": 3.0}
    response = await client.post(CHAT, json={**HI, **fields, **extras})
    assert response.status_code == 200, response.text
    assert "x-quire-ignored-params" not in response.headers
    [request] = engine.requests
    params = request.sampling_params
    assert params.max_tokens == 9
    assert params.logit_bias == ((5, -100.0), (7, 3.5))
    assert params.allowed_token_ids == (1, 2)
    assert params.stop_token_ids == (9,)
    assert (params.logprobs, params.prompt_logprobs) == (4, 1)
    for name in ("min_tokens", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
                 "frequency_penalty", "repetition_penalty", "seed", "ignore_eos"):  # fmt: skip
        assert getattr(params, name) == fields[name], name
    assert (request.priority, request.cache_salt) == (-5, "salt salt")
    assert response.json()["prompt_logprobs"][0] is None


async def test_truncation_keeps_the_end(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    await client.post(COMPLETIONS, json={**PROMPT, "prompt": "abcdef", "truncate_prompt_tokens": 2})
    assert list(engine.requests[0].prompt_token_ids) == ids("ef")
    fields = {**PROMPT, "prompt": "x" * 600, "truncate_prompt_tokens": -1, "max_tokens": 1}
    assert (await client.post(COMPLETIONS, json=fields)).status_code == 200
    assert len(engine.requests[1].prompt_token_ids) == 511


async def test_too_many_prompt_logprobs(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.server.requests.job.MAX_PROMPT_LOGPROBS", 100)
    fields = {**PROMPT, "prompt": ["x" * 20, "y" * 20], "prompt_logprobs": 2}
    response = await client.post(COMPLETIONS, json=fields)
    assert_error(response, 400, "invalid_value", "prompt_logprobs")
