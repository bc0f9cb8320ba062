"""A plan is data: a worker in another process, sent nothing but plans, gets the same tokens."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama import LlamaConfig

from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.outputs import EngineStats
from quire.engine.request import GrammarSpec
from quire.engine.runner.worker import Worker
from quire.engine.step import ModelRunnerOutput, SamplingConstraints, SchedulerOutput
from quire.engine.worker_protocol import Forward, Results

from . import plan_child
from .grammar.constrained import TOKENIZER, VOCAB_SIZE
from .harness import make_request
from .models import COMMON, build_model
from .plan_child import read_frame, write_frame


class Twin:
    """The worker of this process and that of another one, which must say the same."""

    def __init__(self, config: EngineConfig) -> None:
        command = [sys.executable, "-P", plan_child.__file__]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._child.stdin is not None and self._child.stdout is not None
        self._to_child, self._from_child = self._child.stdin, self._child.stdout
        write_frame(self._to_child, config)
        self._worker = Worker(config)
        self.load, self.profile = self._worker.load, self._worker.profile
        self.max_num_seqs = self._worker.max_num_seqs
        self.plans: list[SchedulerOutput] = []
        self.num_constrained = 0
        self.failures: list[Any] = []

    def forward(self, plan: SchedulerOutput) -> Forward:
        self.plans.append(plan)
        write_frame(self._to_child, plan)
        return _TwinForward(self, self._worker.forward(plan))

    def sample(self, forward: Forward, constraints: SamplingConstraints) -> Results:
        self.num_constrained += bool(constraints.mask_rows) + bool(constraints.banned)
        write_frame(self._to_child, constraints)
        results = forward.sample(constraints)

        def compare() -> ModelRunnerOutput:
            here, there = results(), read_frame(self._from_child, ModelRunnerOutput)
            if here != there:
                self.failures.append((here, there))
            return here

        return compare

    def __enter__(self) -> Twin:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Closing its stdin ends the child."""
        if error is not None:
            self._child.kill()
        with self._from_child, contextlib.suppress(BrokenPipeError), self._to_child:
            pass
        assert self._child.wait(30) == 0 or error is not None


class _TwinForward:
    def __init__(self, twin: Twin, forward: Forward) -> None:
        self._twin = twin
        self._forward = forward

    def sample(self, constraints: SamplingConstraints) -> Results:
        return self._twin.sample(self._forward, constraints)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_model(LlamaConfig(**COMMON | {"vocab_size": VOCAB_SIZE})).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(TOKENIZER.to_str())
    return folder


def random_request(rng: random.Random) -> dict[str, Any]:
    """Fields of a request of any kind: sampled, penalised, scored, forked, constrained, a beam."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"seed": rng.randrange(1000), "top_p": 0.9, "n": rng.choice([1, 2, 3])},
        {"seed": rng.randrange(1000), "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
        {"seed": rng.randrange(1000), "bad_words": ((rng.randrange(VOCAB_SIZE),), (7, 8))},
        {"seed": rng.randrange(1000), "min_tokens": 4, "logit_bias": ((5, 2.0),)},
        {"temperature": 0.0, "beam_width": 2},
        {"grammar": GrammarSpec("regex", "[a-f]+1?"), "seed": rng.randrange(1000)},
    ]
    return rng.choice(kinds)


@pytest.mark.parametrize("run_ahead", [False, True])
def test_the_same_results_in_another_process(folder: Path, run_ahead: bool) -> None:
    rng = random.Random(11)
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        num_blocks=9,
        max_num_seqs=8,
        max_num_batched_tokens=24,
        max_model_len=128,
        num_threads=1,
        async_scheduling=run_ahead,
    )
    with Twin(config) as twin:
        stats = run_requests(EngineCore(config, twin), rng)
    assert twin.failures == []
    plans = twin.plans
    assert stats.preemptions and stats.blocks_copied and stats.prefix_hits
    assert any(plan.partial_rows for plan in plans) and any(plan.table_changes for plan in plans)
    assert twin.num_constrained > 20
    assert any(-1 in plan.token_ids for plan in plans) == run_ahead


def run_requests(core: EngineCore, rng: random.Random) -> EngineStats:
    """Sixty requests of all kinds, some of them aborted."""
    stem = [rng.randrange(10, VOCAB_SIZE) for _ in range(40)]
    left, running = 60, []
    while left or core.has_work:
        while left and len(running) < 10 and rng.random() < 0.6:
            prompt = stem[: rng.randrange(1, 40)] + [rng.randrange(10, VOCAB_SIZE)]
            request = make_request(prompt, rng.randrange(4, 30), **random_request(rng))
            core.add_request(request)
            running.append(request.request_id)
            left -= 1
        if running and rng.random() < 0.03:
            core.abort_request(rng.choice(running))
        ended = {one.request_id for one in core.step().outputs if one.finish_reason}
        running = [name for name in running if name not in ended]
    return core.stats()
