"""CUDA graphs of steps in which every row has one new token.

A small model's decode step costs the host more time to launch than the device to run. A graph
launches it at once, over the same addresses each time, so there is one for each of a ladder of
batch sizes, and a step takes the next larger one: its padded rows have length 0 and slot −1, read
no key and write none.

Captured is the model, body and head. What changes from step to step in kind, not in values alone,
stays outside: block copies, log-probabilities of prompts, and sampling, whose operations follow
from the rows' parameters. The graphs share one memory pool and one pair of output buffers: a
step's output stands there until the next replay, and steps run in the order of their launch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from ...errors import one_line
from ...runner.input_batch import DeviceStep

MAX_GRAPH_SIZE = 256
_GRAPH_SIZES = (1, 2, 4, *range(8, MAX_GRAPH_SIZE + 1, 8))

Run = Callable[[], None]
Capture = Callable[[Run], Run]
"""Record what `run` launches; what it returns launches the same again. A test's stand-in, where
there is no CUDA, returns `run` itself."""


class ModelOutput(NamedTuple):
    """Of T tokens: hidden states `[T, hidden_size]` and logits `[T, vocab_size]`."""

    hidden: torch.Tensor
    logits: torch.Tensor


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending. A larger step, with over 256 rows, has work enough to
    hide its launches."""
    largest = min(max_num_seqs, MAX_GRAPH_SIZE)
    return [*(size for size in _GRAPH_SIZES if size < largest), largest]


class NotCapturableError(Exception):
    """What was to be recorded waits for the device (to read a tensor's values, usually)."""


class CudaCapture:
    """The `Capture` of a CUDA device. What it recorded shares one memory pool. Raises
    NotCapturableError before a recording is begun, RuntimeError where one breaks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all: cuBLAS keeps a workspace (32 MiB on Hopper) for each stream that it has seen.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Run) -> Run:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()  # kernels are compiled and libraries take their workspaces before the recording
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
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            run()
        return graph.replay


class DecodeGraphs:
    """The captured sizes of one runner, over its static inputs."""

    def __init__(
        self,
        forward: Callable[[DeviceStep, bool], ModelOutput],
        static_step: Callable[[int], DeviceStep],
        capture: Capture,
    ) -> None:
        """`forward` reads nothing but tensors at fixed addresses, those of its step among them, and
        is told whether rows share prefixes; `static_step(size)` are the tensors from which every
        step of `size` rows is run."""
        self._forward = forward
        self._static_step = static_step
        self._capture = capture
        self._replays: dict[tuple[int, bool], Run] = {}
        self._outputs: ModelOutput | None = None

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int], shared_sizes: Collection[int] = ()) -> None:
        """Largest first, so that the others fit the memory that it took; those of `shared_sizes`
        once more for steps whose rows share prefixes."""
        for size in tqdm(sorted(sizes, reverse=True), "capturing decode graphs", unit="graph"):
            step = self._static_step(size)
            if self._outputs is None:
                self._outputs = ModelOutput(*map(torch.empty_like, self._forward(step, False)))
            capacity = self._outputs.hidden.shape[0]
            for shared in (False, True) if size in shared_sizes else (False,):
                self._replays[size, shared] = self._capture(self._run_of(step, shared, capacity))

    def __contains__(self, size_and_shared: tuple[int, bool]) -> bool:
        return size_and_shared in self._replays

    def _run_of(self, step: DeviceStep, shared: bool, capacity: int) -> Run:
        size = len(step.seq_lens)
        if size > capacity:
            raise ValueError(f"{size} rows after a first graph of {capacity}")

        def run() -> None:
            assert self._outputs is not None
            for buffer, tensor in zip(self._outputs, self._forward(step, shared), strict=True):
                buffer[:size].copy_(tensor)

        return run

    def replay(self, size: int, shared: bool) -> ModelOutput:
        """Run the static step of `size` rows; its output is valid until the next replay."""
        assert self._outputs is not None
        self._replays[size, shared]()
        hidden, logits = self._outputs
        return ModelOutput(hidden[:size], logits[:size])
