"""Test that the real engine core gives the same when stepped by a process and by a thread."""

from __future__ import annotations

import asyncio
from pathlib import Path

from quire.engine.config import EngineConfig
from quire.engine.process.engine_process import build_core
from quire.engine.process.process_client import ProcessEngineClient

from ..clients import collect, tokens_of
from ..fakes import make_request
from ..inline_client import InlineEngineClient
from ..models import save_model


async def test_real_engine_answers_the_same_in_a_process_and_in_a_thread(tmp_path: Path) -> None:
    save_model("qwen3", tmp_path)
    config = EngineConfig(
        model=str(tmp_path),
        dtype="float32",
        device="cpu",
        kv_cache_memory_bytes=2**22,
        num_threads=1,
    )
    answers = []
    for client in (ProcessEngineClient(config), InlineEngineClient(config, build_core)):
        await client.start()
        info = await client.wait_ready()
        requests = [
            make_request(first, max_tokens=8, n=2, seed=first, ignore_eos=True)
            for first in (3, 4, 5)
        ]
        outputs = await asyncio.gather(*(collect(client, request) for request in requests))
        await client.close()
        answers.append((info, [[tokens_of(o, choice) for choice in range(2)] for o in outputs]))
    assert answers[0] == answers[1]
    assert all(len(tokens) == 8 for request in answers[0][1] for tokens in request)
