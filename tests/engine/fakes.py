"""A fake engine core without model or scheduler: token i of a choice is prompt[0] + choice + i.

It also runs inside the engine process, as "fakes:build_core" (conftest.py sets PYTHONPATH). The
first prompt token may request a fault, and `EngineConfig.model` a failed start.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

from quire.engine.config import EngineConfig, EngineInfo
from quire.engine.core.trials import Trials
from quire.engine.errors import InvalidRequestError, ModelLoadError
from quire.engine.events.block_events import BlockEvent
from quire.engine.outputs import (
    EngineStats,
    FinishReason,
    LiveSnapshot,
    SequenceOutput,
    StepOutput,
    Timings,
)
from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams

VOCAB_SIZE = 100_000
HANG, CRASH, EXIT, LOSE, SLOW, STAMPED = range(1, 7)
"""HANG: the step never ends. CRASH: it raises. EXIT: the process ends. LOSE: the request is
forgotten. SLOW: 20 ms a step. STAMPED: tokens carry their step's time, as Timings.finished."""

_ids = count()


def make_request(first_token: int = 100, max_tokens: int = 5, n: int = 1, **params: Any) -> Request:
    return Request(
        request_id=f"request-{next(_ids)}",
        prompt_token_ids=(first_token, 1, 2),
        sampling_params=SamplingParams(max_tokens=max_tokens, n=n, **params),
        arrival_time=time.monotonic(),
    )


def expected_tokens(request: Request, choice: int = 0) -> list[int]:
    first = request.prompt_token_ids[0] + choice
    return list(range(first, first + request.sampling_params.max_tokens))


class FakeCore:
    def __init__(self, config: EngineConfig) -> None:
        if config.model == "broken":
            raise ModelLoadError("the weights are broken")
        if config.model == "crash-at-load":
            raise RuntimeError("crashed while loading")
        self.config = config
        self._running: dict[tuple[str, int], tuple[Request, int]] = {}
        self._aborted: list[SequenceOutput] = []
        self._trials = Trials()
        self._begun: set[str] = set()
        self._on_begin: Callable[[list[str]], None] = lambda request_ids: None
        self._step = 0
        self._resets = 0

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model=self.config.model,
            architecture="Fake",
            device="cpu",
            dtype="float32",
            num_parameters=1,
            vocab_size=VOCAB_SIZE,
            max_model_len=100_000,
            block_size=self.config.block_size,
            num_blocks=1000,
            kv_bytes_per_token=1,
            max_num_batched_tokens=512,
            is_asynchronous=False,
            max_num_seqs=256,
            max_logprobs=20,
            eos_token_ids=(0,),
        )

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._aborted)

    def watch_begins(self, on_begin: Callable[[list[str]], None]) -> None:
        self._on_begin = on_begin

    def add_request(self, request: Request) -> None:
        if request.sampling_params.max_tokens > 50_000:
            raise InvalidRequestError("too many tokens", "max_tokens")
        if request.prompt_token_ids[0] == LOSE:
            return
        for choice in request.open_choices:
            done = len(request.resume[choice] or ()) if request.resume else 0
            self._running[request.request_id, choice] = (request, done)

    def abort_request(self, request_id: str, choice: int | None = None) -> None:
        for key in list(self._running):
            if key[0] == request_id and choice in (None, key[1]):
                del self._running[key]
                self._aborted.append(SequenceOutput(*key, [], finish_reason="abort"))

    def step(self) -> StepOutput:
        self._step += 1
        outputs, self._aborted = self._aborted, []
        active = {
            key: value
            for key, value in self._running.items()
            if key[0] in self._begun or self._trials.admits(value[0])
        }
        if new := {request_id for request_id, _ in active} - self._begun:
            self._begun |= new
            self._on_begin(sorted(new))
        commands = {request.prompt_token_ids[0] for request, _ in active.values()}
        if HANG in commands:
            time.sleep(3600)
        if CRASH in commands:
            raise RuntimeError("crashed in a step")
        if EXIT in commands:
            time.sleep(0.01)  # as a forward takes longer than a message
            os._exit(3)
        if SLOW in commands:
            time.sleep(0.02)
        for key, (request, done) in active.items():
            reason: FinishReason | None = None
            if done + 1 == request.sampling_params.max_tokens:
                reason = "length"
                del self._running[key]
            else:
                self._running[key] = (request, done + 1)
            token_id = request.prompt_token_ids[0] + key[1] + done
            timings = None
            if request.prompt_token_ids[0] == STAMPED:
                time.sleep(0.002)
                timings = Timings(None, None, time.monotonic())
            outputs.append(SequenceOutput(*key, [token_id], finish_reason=reason, timings=timings))
        self._trials.observe(outputs)
        return StepOutput(outputs, self.stats())

    def reset_prefix_cache(self) -> None:
        self._resets += 1

    def close(self) -> None:
        pass

    def snapshot(self) -> LiveSnapshot:
        blocks = bytes([2] * len(self._running)).ljust(1000, b"\0")
        return LiveSnapshot(time.monotonic(), self.stats(), 0, 16, blocks, [], [], [])

    def end_snapshots(self) -> None:
        pass

    def record_blocks(self, on: bool) -> None:
        pass

    def take_block_events(self) -> list[BlockEvent]:
        return []

    def known_blocks(self) -> list[bytes]:
        return []

    def stats(self) -> EngineStats:
        return EngineStats(
            step=self._step,
            num_running=len(self._running),
            num_waiting=0,
            num_blocks=1000,
            num_free_blocks=1000 - len(self._running),
            num_cached_blocks=0,
            step_tokens=len(self._running),
            prefix_queries=0,
            prefix_hits=0,
            preemptions=self._resets,
            blocks_copied=0,
            blocks_shared=0,
        )


def build_core(config: EngineConfig) -> FakeCore:
    return FakeCore(config)


class SlowChatCore(FakeCore):
    """A core that is slow if a prompt begins with HANG, as the demo model's conversations do."""

    def add_request(self, request: Request) -> None:
        first, *rest = request.prompt_token_ids
        if first == HANG:
            request = replace(request, prompt_token_ids=(SLOW, *rest))
        super().add_request(request)


def build_slow_chat_core(config: EngineConfig) -> FakeCore:
    return SlowChatCore(config)


def build_broken_core(config: EngineConfig) -> FakeCore:
    raise ModelLoadError("the weights are broken")
