"""An engine with a script in place of the model; everything else is what `quire serve` runs.

Scheduler, step loop, model runner, the inputs of a step, the sampler's plan, results and messages
are the real ones. The model returns its input, and the sampler looks up which token follows which.
So a step takes only the host's time, or SECONDS_PER_STEP if that is longer.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch

from quire.engine.body.body import BodyOutput
from quire.engine.config import EngineConfig, WorkerInfo
from quire.engine.core.engine_core import EngineCore
from quire.engine.devices.backend import Backend
from quire.engine.model.causal_lm import WeightFacts
from quire.engine.model.model_spec import read_hf_config, spec_from_hf_config
from quire.engine.parallel.ranks import Ranks
from quire.engine.runner import worker
from quire.engine.sampling.batch import SamplingBatch
from quire.engine.sampling.draws import BestTokens
from quire.engine.sampling.sampler import Sampler, SamplerOutput
from quire.engine.step import ModelRunnerOutput, SamplingConstraints, SchedulerOutput
from quire.engine.worker_protocol import Forward, Results

TEXT = "A server that streams: it says one word after another, until all has been said. "


class ScriptedModel:
    """A stand-in for a CausalLM. The hidden state and the logits of a token are its id."""

    device, dtype, kv_cache_dtype = torch.device("cpu"), torch.float32, torch.float32
    num_parameters, can_generate, has_ends, scores = 1, True, True, None
    runs_tokens_alone = is_batch_invariant = False
    weights = WeightFacts("none", "none", 1, 0)

    def __init__(self, config: EngineConfig, _: Backend, ranks: Ranks) -> None:
        self.spec = self.whole_spec = spec_from_hf_config(read_hf_config(config), config)

    def forward(self, input_ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return input_ids[:, None]

    def forward_to_logits(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logit_indices: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> BodyOutput:
        hidden = self.forward(input_ids)
        return BodyOutput(hidden, hidden[logit_indices])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class ScriptedSampler(Sampler):
    """A sampler that repeats the tokens of a text."""

    def __init__(self, vocab_size: int, script: list[int]) -> None:
        super().__init__(vocab_size, torch.device("cpu"))
        tokens = torch.tensor(script)
        self._next = tokens[torch.arange(vocab_size) % len(script)]
        self._next[tokens] = tokens.roll(-1)

    def __call__(
        self,
        logits: torch.Tensor,
        batch: SamplingBatch,
        token_bitmask: torch.Tensor | None = None,
        found: BestTokens | None = None,
    ) -> SamplerOutput:
        token_ids = self._next[logits[:, 0]]
        return SamplerOutput(token_ids, torch.ones(len(token_ids), dtype=torch.bool), None)


class ScriptedWorker(worker.Worker):
    """A worker whose steps end at least `period` seconds apart."""

    def __init__(self, config: EngineConfig, period: float) -> None:
        super().__init__(config)
        self._period = period
        self._next = 0.0

    def load(self) -> WorkerInfo:
        worker.load_model = ScriptedModel  # type: ignore[assignment]
        return super().load()

    def profile(self) -> int:
        num_blocks = super().profile()
        encoder = tokenizers.Tokenizer.from_file(str(Path(self._config.model) / "tokenizer.json"))
        script = list(dict.fromkeys(encoder.encode(TEXT, add_special_tokens=False).ids))
        vocab_size = self._model.spec.vocab_size
        self._runner._sampler = ScriptedSampler(vocab_size, script)
        return num_blocks

    def forward(self, scheduler_output: SchedulerOutput) -> Forward:
        step = super().forward(scheduler_output)
        return _Slowed(self, step) if self._period else step

    def wait(self) -> None:
        """Block until the step's time is over."""
        now = time.monotonic()
        self._next = max(self._next + self._period, now)
        time.sleep(self._next - now)


class _Slowed:
    """A step whose results are available only after `ScriptedWorker.wait` has returned."""

    def __init__(self, worker: ScriptedWorker, step: Forward) -> None:
        self._worker = worker
        self._step = step

    def sample(self, constraints: SamplingConstraints) -> Results:
        results = self._step.sample(constraints)

        def wait() -> ModelRunnerOutput:
            self._worker.wait()
            return results()

        return wait


def build_core(config: EngineConfig) -> EngineCore:
    """Build the core. The engine process gets this function as "scripted_worker:build_core"."""
    return EngineCore(config, ScriptedWorker(config, float(os.environ["SECONDS_PER_STEP"])))
