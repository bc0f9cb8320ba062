"""The CUDA backend on the CPU, with plain references or Triton's interpreter instead of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quire.engine.config import EngineConfig
from quire.engine.devices.backend import CacheDemand, Graphs, Rehearsal, StartRehearsal
from quire.engine.devices.cpu.draws import CpuDraws
from quire.engine.devices.cuda.backend import CudaBackend
from quire.engine.devices.cuda.layers.kernels import TRITON, Kernels
from quire.engine.devices.cuda.step_graphs import Capture, Run, StepGraphs
from quire.engine.devices.steps import GraphKey, ModelOutput
from quire.engine.runner.speculative_runner import DraftRunner
from quire.engine.sampling.draws import BestTokens
from quire.engine.sampling.sampler import Sampler
from quire.kernels import reference, reference_states
from quire.kernels.prefix_groups import find_prefix_groups


def _no_schedule(*_: Any, **__: Any) -> None:
    """Stand in for build_decode_schedule, because the reference of decode reads no schedule."""


REFERENCES = Kernels(
    **{
        name: getattr(reference, name, getattr(reference_states, name, _no_schedule))
        for name in Kernels._fields
    }  # type: ignore[arg-type]
)._replace(chunked_recurrence=reference_states.gated_recurrence)
"""Plain torch for each kernel."""


class RerunCapture:
    """A capture without CUDA: a replay runs the same code again over the same static tensors."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, run: Run) -> Run:
        def replay() -> None:
            self.num_replays += 1
            run()

        return replay


class CudaOnCpuBackend(CudaBackend):
    """A third device, which runs the CUDA backend on the CPU.

    It captures no graphs unless it is given their `sizes`, and those of mixed steps of `mixed`
    tokens besides. It takes the size of the cache from `config.num_blocks`. `reruns` counts the
    replays of its graphs.
    """

    def __init__(
        self,
        kernels: Kernels = REFERENCES,
        *,
        sizes: Sequence[int] = (),
        mixed: Sequence[int] = (),
        capture: Capture | None = None,
        find_groups: Any = find_prefix_groups,
    ) -> None:
        super().__init__(torch.device("cpu"), kernels, find_groups)
        self.reruns = RerunCapture()
        self._sizes, self._capture_stand_in = list(sizes), capture or self.reruns
        self._mixed = list(mixed)

    def check_ranks(self, config: EngineConfig) -> None:
        """Accept any number of ranks."""

    def default_dtype(self, checkpoint: str) -> str:
        return "float32"

    @property
    def random_devices(self) -> list[int]:
        return []

    def make_sampler(self, vocab_size: int) -> Sampler:
        return Sampler(vocab_size, self.device, CpuDraws(vocab_size))

    def cache_memory(self, demand: CacheDemand, start: StartRehearsal) -> int:
        return 0

    def graph_sizes(self, config: EngineConfig) -> list[int]:
        return self._sizes

    def mixed_sizes(self, config: EngineConfig, runner: Rehearsal) -> list[int]:
        return self._mixed

    def prepare(self, runner: Rehearsal, config: EngineConfig) -> Graphs | None:
        """Let each replay return copies of the likeliest tokens. A GPU sends them to the host
        before its next replay overwrites them; tensors on the host are not copied. A draft model's
        are not sent one by one."""
        graphs = super().prepare(runner, config)
        if isinstance(graphs, StepGraphs) and not isinstance(runner, DraftRunner):
            replay = graphs.replay

            def replay_and_copy(key: GraphKey) -> ModelOutput:
                output = replay(key)
                if output.best is None:
                    return output
                return output._replace(best=BestTokens(*(part.clone() for part in output.best)))

            graphs.replay = replay_and_copy  # type: ignore[method-assign]
        return graphs

    def make_capture(self) -> Capture:
        return self._capture_stand_in


def interpreted(**options: Any) -> CudaOnCpuBackend:
    """Return a backend with the Triton kernels, which run here only under Triton's interpreter."""
    return CudaOnCpuBackend(TRITON, **options)
