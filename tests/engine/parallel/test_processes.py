"""Ranks in processes of their own, over torch.distributed. `make test-parallel` runs more of it."""

from __future__ import annotations

import signal
from pathlib import Path

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
