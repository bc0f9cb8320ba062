"""Helpers shared by the tests of engine clients: an observer, and answers as lists."""

from __future__ import annotations

from quire.engine.client import EngineClient
from quire.engine.config import EngineInfo
from quire.engine.outputs import EngineStats, SequenceOutput
from quire.engine.request import Request


class Observer:
    """An observer that records what an engine client reports to it."""

    def __init__(self) -> None:
        self.infos: list[EngineInfo] = []
        self.stats: list[EngineStats] = []
        self.restarts = 0

    def engine_ready(self, info: EngineInfo) -> None:
        self.infos.append(info)

    def engine_restarted(self) -> None:
        self.restarts += 1

    def observe_step(self, stats: EngineStats) -> None:
        self.stats.append(stats)


async def collect(client: EngineClient, request: Request) -> list[SequenceOutput]:
    """Submit the request and return all its outputs."""
    return [output async for output in client.generate(request)]


def tokens_of(outputs: list[SequenceOutput], choice: int = 0) -> list[int]:
    return [token for output in outputs if output.choice == choice for token in output.token_ids]
