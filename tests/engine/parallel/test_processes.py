"""Ranks in processes of their own, over torch.distributed. `make test-parallel` runs more of it."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.errors import ConfigurationError
from quire.engine.lora import AdapterSource
from quire.engine.parallel.leader import Leader

from .. import models
from ..lora_models import save_adapter
from ..test_oracle import Reference
from ..worker_driver import make_prompts
from .groups import running_group, wait_gone


async def test_a_group_serves_and_ends_with_a_rank(tmp_path: Path) -> None:
    """And an adapter that is loaded at run time reaches all ranks, as do the blocks that the cache
    has no room for."""
    base = models.save_model("llama", tmp_path)
    adapted = save_adapter(base, tmp_path / "late", r=4, target_modules="all-linear")
    config = {"tensor_parallel_size": 2, "enable_lora": True, "kv_offloading_size": 2**20}
    config |= {"num_blocks": 9}
    async with running_group(tmp_path, **config) as group:
        for adapter, model in ((None, base), ("late", adapted)):
            if adapter is not None:
                await group.client.load_adapter(AdapterSource("late", str(tmp_path / "late")))
            reference = Reference(model)
            expected = [reference.complete(prompt, 8) for prompt in make_prompts([5, 40, 17])]
            for _ in range(2):
                assert await group.answer(adapter=adapter) == expected
        await group.client.unload_adapter("late")
        everyone = group.everyone
        assert len(everyone) == 2
        everyone[1].send_signal(signal.SIGKILL)
        await wait_gone(everyone, 1.0)


def test_an_address_that_cannot_be_listened_on_is_one_line(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("s" * 32)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for address in ("127.0.0.1", "no.such.host.invalid"):
            config = EngineConfig(
                model="m",
                tensor_parallel_size=2,
                nnodes=2,
                master_addr=address,
                master_port=port,
                node_key_file=None if address == "127.0.0.1" else str(secret),
            )
            with pytest.raises(ConfigurationError, match=rf"cannot listen on tcp://{address}:"):
                Leader(config)
