"""CUDA graphs of steps in which every row has one new token.

A small model's decode step costs the host more time to launch than the device to run. A graph
launches it at once, over the same addresses each time. So there is one graph for each of a ladder
of batch sizes, and a step takes the next larger one: its padded rows have length 0 and slot −1,
read no key and write none.

A graph holds the model, body and head. Outside of it stays everything whose operations, not only
values, change from step to step: block copies, log-probabilities of prompts, and sampling. The
graphs share one memory pool and one pair of output buffers: a step's output stays there until the
next replay, and steps run in the order of their launch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import product

import torch
from tqdm import tqdm

from ...errors import one_line
from ..steps import DeviceStep, GraphKey, ModelOutput

MAX_GRAPH_SIZE = 256
"""Maximum number of rows. A larger step has enough work to hide its launches."""
_GRAPH_SIZES = (1, 2, 4, *range(8, MAX_GRAPH_SIZE + 1, 8))

Run = Callable[[], None]
Capture = Callable[[Run], Run]
"""Records what `run` launches and returns a function that launches the same again. Without CUDA,
a stand-in may return `run` itself."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes to capture, ascending."""
    largest = min(max_num_seqs, MAX_GRAPH_SIZE)
    return [*(size for size in _GRAPH_SIZES if size < largest), largest]


class NotCapturableError(Exception):
    """A step waits for the device, usually to read a tensor's values: it cannot be recorded."""


class CudaCapture:
    """The `Capture` of a CUDA device. All its recordings share one memory pool. Raises
    NotCapturableError before a recording begins, RuntimeError if one breaks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all: cuBLAS keeps a workspace (32 MiB on Hopper) for each stream that it has seen.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Run) -> Run:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            # 1. Run it once: kernels are compiled and libraries take their workspaces.
            run()
            # 2. Run it again, with an error if it waits for the device.
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise NotCapturableError(one_line(error)) from error
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream(self._device).wait_stream(stream)
        # 3. Record it.
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile: NCCL's watchdog looks at events.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            run()
        return graph.replay


class DecodeGraphs:
    """The captured decode steps of one runner, over its static inputs."""

    def __init__(
        self,
        forward: Callable[[DeviceStep, bool, bool], ModelOutput],
        static_step: Callable[[int], DeviceStep],
        capture: Capture,
    ) -> None:
        """`forward(step, shared, adapted)` runs the model, with or without shared prefixes and
        adapters, and reads only tensors at fixed addresses. `static_step(size)` returns the tensors
        that every step of `size` rows reads."""
        self._forward = forward
        self._static_step = static_step
        self._capture = capture
        self._replays: dict[GraphKey, Run] = {}
        self._outputs: ModelOutput | None = None

    @torch.inference_mode()
    def capture(
        self,
        sizes: Sequence[int],
        shared_sizes: Collection[int] = (),
        *,
        with_adapters: bool = False,
    ) -> None:
        """Capture these sizes, and those of `shared_sizes` once more for steps whose rows share
        prefixes; all of them once more if rows may have adapters. The largest comes first, so that
        the others fit the memory that it took."""
        for size in tqdm(sorted(sizes, reverse=True), "capturing decode graphs", unit="graph"):
            step = self._static_step(size)
            if self._outputs is None:
                blank = self._forward(step, False, False)
                self._outputs = ModelOutput(*map(torch.empty_like, blank))
            kinds = product({False, size in shared_sizes}, {False, with_adapters})
            for shared, adapted in sorted(kinds):
                run = self._run_of(step, shared, adapted)
                self._replays[GraphKey(size, shared, adapted)] = self._capture(run)

    def __contains__(self, key: object) -> bool:
        return key in self._replays

    def _run_of(self, step: DeviceStep, shared: bool, adapted: bool) -> Run:
        assert self._outputs is not None
        size, outputs = len(step.seq_lens), self._outputs
        capacity = outputs.hidden.shape[0]
        if size > capacity:
            raise ValueError(f"{size} rows after a first graph of {capacity}")

        def run() -> None:
            for buffer, tensor in zip(outputs, self._forward(step, shared, adapted), strict=True):
                buffer[:size].copy_(tensor)

        return run

    def replay(self, key: GraphKey) -> ModelOutput:
        """Run the static step of this kind; its output is valid until the next replay."""
        assert self._outputs is not None
        self._replays[key]()
        hidden, logits = self._outputs
        return ModelOutput(hidden[: key.size], logits[: key.size])
