"""Serve LoRA adapters over HTTP: the real server, the demo model, adapters made by PEFT."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from .engine.lora_models import change_config, save_adapter
from .engine.models import generate
from .test_end_to_end import MODEL, Server

DEMO = Path(__file__).parents[1] / "configs" / "demo"
PROMPT = "Once upon a time there was"
NUM_TOKENS = 24
ADMIN = {"authorization": "Bearer admin"}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ADAPTERS: dict[str, dict[str, Any]] = {
    "small": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "size": 0.3},
    "all": {"r": 24, "lora_alpha": 24, "target_modules": "all-linear", "size": 0.08},
    "late": {"r": 8, "lora_alpha": 8, "target_modules": ["down_proj"], "size": 0.2},
}


class Expected:
    """The texts that PEFT generates, by adapter, and the adapters' folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        base = AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32").eval()
        models = {MODEL: base}
        for seed, (name, config) in enumerate(ADAPTERS.items()):
            models[name] = save_adapter(base, folder / name, seed=seed, **config)
        ids = tokenizer(PROMPT).input_ids
        self.texts = {
            name: tokenizer.decode(generate(model, ids, NUM_TOKENS), skip_special_tokens=True)
            for name, model in models.items()
        }
        assert len(set(self.texts.values())) == len(self.texts)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return Expected(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def server(expected: Expected) -> Iterator[Server]:
    flags = [f"--lora={name}={expected.folder / name}" for name in ("small", "all")]
    flags += ["--lora-dir", str(expected.folder), "--admin-api-key", "admin"]
    with Server(*flags, "--http-workers", "2", "--max-loras", "2") as server:
        yield server


def ask(server: Server, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    return server.http.post("/v1/completions", json=body | {"ignore_eos": True} | fields)


def text_of(server: Server, model: str) -> str:
    answer = ask(server, model)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    text: str = answer.json()["choices"][0]["text"]
    return text


def change(server: Server, path: str, **body: Any) -> httpx.Response:
    return server.http.post(path, json=body, headers=ADMIN)


def names(server: Server) -> list[set[str]]:
    """Return the names that the server lists over several new connections, which both HTTP workers
    accept."""
    found = []
    for _ in range(12):
        with httpx.Client(base_url=server.address, timeout=20) as client:
            cards = client.get("/v1/models", headers=ADMIN).json()["data"]
            found.append({card["id"] for card in cards})
    return found


def wait_ready(server: Server) -> None:
    for _ in range(600):
        if server.http.get("/ready").status_code == 200:
            return
        time.sleep(0.1)
    raise AssertionError("the engine does not come back")


async def test_adapters_and_the_base_in_one_batch_equal_peft(
    server: Server, expected: Expected
) -> None:
    """The openai client sends all of them at once."""
    client = openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)

    async def complete(model: str) -> tuple[str, str]:
        answer = await client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=NUM_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.model == model
        return model, answer.choices[0].text

    async with client:
        listed = [model.id async for model in client.models.list()]
        assert listed == [MODEL, "small", "all"]
        asked = [MODEL, "small", "all"] * 3
        for model, text in await asyncio.gather(*map(complete, asked)):
            assert text == expected.texts[model], model


def test_bad_adapters_are_refused_while_requests_run(server: Server, expected: Expected) -> None:
    broken = expected.folder / "broken"
    shutil.copytree(expected.folder / "late", broken)
    change_config(broken, use_dora=True)
    cut = expected.folder / "cut"
    shutil.copytree(expected.folder / "late", cut)
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    body = {"model": "all", "prompt": PROMPT, "max_tokens": 300, "stream": True, "temperature": 0}
    with server.http.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        for path, message in (("broken", "use_dora"), ("cut", "cannot read"), ("none", "folder")):
            answer = change(server, LOAD, lora_name="late", lora_path=path)
            assert answer.status_code == 400 and message in answer.json()["error"]["message"]
            assert answer.json()["error"]["param"] == "lora_path"
        clash = change(server, LOAD, lora_name="small", lora_path="late")
        assert clash.status_code == 400 and clash.json()["error"]["param"] == "lora_name"
        *_, last, done = lines
        assert '"finish_reason":"length"' in last.replace(" ", "") and done == "data: [DONE]"
    assert text_of(server, "small") == expected.texts["small"]
    assert names(server) == [{MODEL, "small", "all"}] * 12
    shutil.rmtree(broken)
    shutil.rmtree(cut)


def test_adapters_come_and_go_in_all_workers(server: Server, expected: Expected) -> None:
    assert ask(server, "late").status_code == 404
    assert change(server, LOAD, lora_name="late", lora_path="late").status_code == 200
    assert names(server) == [{MODEL, "small", "all", "late"}] * 12
    assert text_of(server, "late") == expected.texts["late"]
    # Another adapter under the same name; the prefix of the old one is not found.
    answer = change(server, LOAD, lora_name="late", lora_path="all", load_inplace=True)
    assert answer.status_code == 200
    assert text_of(server, "late") == expected.texts["all"]
    assert change(server, LOAD, lora_name="late", lora_path="late", load_inplace=True).is_success
    assert text_of(server, "late") == expected.texts["late"]
    # Unloaded while a request runs: it finishes, and new ones are refused.
    body = {"model": "late", "prompt": PROMPT, "max_tokens": 200, "stream": True, "temperature": 0}
    with server.http.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        assert change(server, UNLOAD, lora_name="late").status_code == 200
        refused = ask(server, "late")
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "model_not_found"
        *_, last, done = lines
        assert '"finish_reason":"length"' in last.replace(" ", "") and done == "data: [DONE]"
    assert names(server) == [{MODEL, "small", "all"}] * 12
    assert change(server, UNLOAD, lora_name="late").status_code == 404


def test_a_restarted_engine_has_the_adapters_that_were_loaded(
    server: Server, expected: Expected
) -> None:
    """Except one whose files have vanished since: that does not keep it from starting."""
    gone = expected.folder / "gone"
    shutil.copytree(expected.folder / "late", gone)
    for name in ("late", "gone"):
        assert change(server, LOAD, lora_name=name, lora_path=name).status_code == 200
    assert change(server, UNLOAD, lora_name="small").status_code == 200
    shutil.rmtree(gone)
    engine = next(
        child
        for child in psutil.Process(server.process.pid).children()
        if "quire.engine.process.engine_process" in child.cmdline()
    )
    engine.kill()
    while server.http.get("/ready").status_code == 200:
        time.sleep(0.02)
    wait_ready(server)
    time.sleep(0.5)  # until the other worker has heard of it too
    assert names(server) == [{MODEL, "all", "late"}] * 12
    for name in (MODEL, "all", "late"):
        assert text_of(server, name) == expected.texts[name]
    assert change(server, LOAD, lora_name="small", lora_path="small").status_code == 200
    assert text_of(server, "small") == expected.texts["small"]


def test_metrics_name_the_adapters(server: Server) -> None:
    text_of(server, "all")
    lines = server.http.get("/metrics").text.splitlines()
    (line,) = (line for line in lines if line.startswith("quire:lora_requests_info{"))
    assert 'max_lora="2"' in line and 'waiting_lora_adapters=""' in line


def test_a_server_with_a_bad_adapter_does_not_start(expected: Expected, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(expected.folder / "late", folder)
    change_config(folder, r=9)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "quire.server.cli", "serve", "--port", "0"]
        + ["--log-format", "json", "--lora", f"bad={folder}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("quire: cannot load the adapter 'bad': ") and "has the shape" in last
