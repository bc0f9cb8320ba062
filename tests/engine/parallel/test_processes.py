"""Ranks in processes of their own, over torch.distributed."""

from __future__ import annotations

import signal
from pathlib import Path

from .. import models
from ..test_oracle import Reference
from ..worker_driver import make_prompts
from .groups import running, wait_gone


async def test_a_group_serves_and_starts_again_when_a_rank_dies(tmp_path: Path) -> None:
    reference = Reference(models.save_model("llama", tmp_path))
    expected = [reference.complete(prompt, 8) for prompt in make_prompts([5, 40, 17])]
    async with running(tmp_path, tensor_parallel_size=2) as group:
        assert await group.answer() == expected
        leader, (follower,) = group.leader, group.followers
        follower.send_signal(signal.SIGKILL)
        await wait_gone([leader, follower], 1.0)
        await group.wait_restarted(1)
        assert await group.answer() == expected
        leader, followers = group.leader, group.followers
        leader.send_signal(signal.SIGKILL)
        await wait_gone([leader, *followers], 1.0)
        await group.wait_restarted(2)
        assert await group.answer() == expected
