"""A supervised engine of several processes, and what is left of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil

from quire.engine.process.process_client import ProcessEngineClient

from ..clients import Observer, collect, tokens_of
from ..harness import make_request
from ..worker_driver import make_config, make_prompts

PATIENCE_SECONDS = 300.0


class RunningGroup:
    def __init__(self, client: ProcessEngineClient, observer: Observer) -> None:
        self.client, self.observer = client, observer

    @property
    def everyone(self) -> list[psutil.Process]:
        """The ranks of this host in their order, as far as they run: rank 0 is our child, the
        others are its."""
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "engine_process" in " ".join(child.cmdline()):
                    return [child, *child.children()]
        return []

    async def answer(self, max_tokens: int = 8, **params: Any) -> list[list[int]]:
        """Return the tokens of several requests that run together."""
        outputs = await asyncio.gather(
            *(
                collect(
                    self.client,
                    make_request(prompt, max_tokens, temperature=0.0, ignore_eos=True, **params),
                )
                for prompt in make_prompts([5, 40, 17])
            )
        )
        assert all(one[-1].error is None for one in outputs)
        return [tokens_of(one) for one in outputs]

    async def wait_restarted(self, restarts: int) -> None:
        """Wait until the engine has been restarted so often and serves again."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self.observer.infos) <= restarts:
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def running_group(folder: Path, **config: Any) -> AsyncIterator[RunningGroup]:
    """Run an engine of several ranks on the CPU; nothing of it is left at the end."""
    observer = Observer()
    client = ProcessEngineClient(
        make_config(folder, max_num_batched_tokens=64, **config),
        observer=observer,
        stall_timeout=PATIENCE_SECONDS,
    )
    await client.start()
    left: list[psutil.Process] = []
    try:
        await client.wait_ready()
        group = RunningGroup(client, observer)
        yield group
        left = group.everyone
    finally:
        await client.close()
    await wait_gone(left, 1.0)


async def wait_gone(processes: list[psutil.Process], seconds: float) -> None:
    """Wait until none of the processes is left. Fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while any(one.is_running() and one.status() != "zombie" for one in processes):
            await asyncio.sleep(0.01)
