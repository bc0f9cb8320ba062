"""Ranks in processes of their own, over torch.distributed. `make test-parallel` runs more of it."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.errors import ConfigurationError
from quire.engine.parallel.leader import Leader

from .. import models
from ..test_oracle import Reference
from ..worker_driver import make_prompts
from .groups import running_group, wait_gone


async def test_a_group_serves_and_ends_with_a_rank(tmp_path: Path) -> None:
    reference = Reference(models.save_model("llama", tmp_path))
    async with running_group(tmp_path, tensor_parallel_size=2) as group:
        expected = [reference.complete(prompt, 8) for prompt in make_prompts([5, 40, 17])]
        assert await group.answer() == expected
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
                node_key_file=str(secret),
            )
            with pytest.raises(ConfigurationError, match=rf"cannot listen on tcp://{address}:"):
                Leader(config)
