"""The processes that serve HTTP do not load torch, unless a model's own tokenizer imports it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from ..test_cli import MODEL, Server, launch, serving

BUILD = """
import asyncio, sys
from quire.engine.process.process_client import ProcessEngineClient
from quire.server.metrics.metrics import Metrics
from quire.server.serving.http_server import build_app
from quire.server.settings import load_settings

settings = load_settings(**{flags!r})
client = ProcessEngineClient(settings.engine_config())
tokenizer = build_app(settings, client, Metrics("m", "quire")).state.quire.tokenizer
messages = [{{"role": "user", "content": "Hello"}}]
assert asyncio.run(tokenizer.encode_chat(messages, add_generation_prompt=True))
print(tokenizer.info()["tokenizer_class"], "torch" in sys.modules)
import torch
assert torch.zeros(1).shape == (1,)
"""
CUSTOM = """
import torch
from transformers import PreTrainedTokenizerFast


class CustomTokenizer(PreTrainedTokenizerFast):
    longest = torch.finfo(torch.float32).max
"""


def build(cache: Path, **flags: object) -> tuple[str, bool, str]:
    """Return the tokenizer's class, whether building the app imported torch, and the log."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", BUILD.format(flags=flags)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    name, imported = done.stdout.split()
    return name, imported == "True", done.stderr


def test_the_app_is_built_without_torch_but_torch_stays_importable(tmp_path: Path) -> None:
    _, imported, log = build(tmp_path)
    assert not imported
    assert "PyTorch" not in log


def test_a_models_own_tokenizer_may_import_torch(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "CustomTokenizer"
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_custom.CustomTokenizer"]}
    path.write_text(json.dumps(config))
    (folder / "tokenization_custom.py").write_text(CUSTOM)
    name, imported, _ = build(tmp_path / "cache", model=str(folder), trust_remote_code=True)
    assert (name, imported) == ("CustomTokenizer", True)


def maps_torch(process: psutil.Process) -> bool:
    return any("torch" in mapped.path for mapped in process.memory_maps())


def test_a_server_does_not_map_torch() -> None:
    with serving() as server:
        assert not maps_torch(psutil.Process(server.process.pid))


def test_workers_do_not_map_torch() -> None:
    with launch("--http-workers", "2") as process:
        server = Server(process)
        server.http.close()
        main = psutil.Process(process.pid)
        workers = [c for c in main.children() if "quire.server.serving.http_worker" in c.cmdline()]
        assert len(workers) == 2
        assert not any(map(maps_torch, [main, *workers]))
