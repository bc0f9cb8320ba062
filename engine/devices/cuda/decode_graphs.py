"""CUDA graphs of steps in which every row has one new token, or the same small number of them.

A small model's decode step costs the host more time to launch than the device to run. A graph
launches it at once, over the same addresses each time. So there is one graph for each of a ladder
of batch sizes, and a step takes the next larger one: its padded rows have length 0 and slot −1,
read no key and write none. Steps with drafts have a ladder of their own, in which every row is
padded to the same number of tokens.

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
MAX_DRAFT_SIZE = 32
"""Maximum number of rows with drafts. Larger steps seldom have any, since they do not pay there."""

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
        forward: Callable[[DeviceStep, GraphKey], ModelOutput],
        static_step: Callable[[int, int], DeviceStep],
        capture: Capture,
    ) -> None:
        """`forward(step, key)` runs the model as the key says, and reads only tensors at fixed
        addresses. `static_step(size, query_len)` returns the tensors that every step of `size` rows
        with `query_len` tokens each reads."""
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
        draft_sizes: Sequence[int] = (),
        query_len: int = 1,
    ) -> None:
        """Capture these sizes, and those of `shared_sizes` once more for steps whose rows share
        prefixes; all of them once more if rows may have adapters. Capture `draft_sizes` for rows of
        `query_len` tokens. The largest comes first, so that the others fit the memory that it
        took."""
        keys = [GraphKey(size, False, False, query_len) for size in draft_sizes]
        for size in sizes:
            kinds = product({False, size in shared_sizes}, {False, with_adapters})
            keys += [GraphKey(size, shared, adapted) for shared, adapted in sorted(kinds)]
        keys.sort(key=lambda key: key.num_tokens, reverse=True)
        for key in tqdm(keys, "capturing decode graphs", unit="graph"):
            step = self._static_step(key.size, key.query_len)
            if self._outputs is None:
                blank = self._forward(step, key._replace(shared=False, adapted=False))
                self._outputs = ModelOutput(*map(torch.empty_like, blank))
            self._replays[key] = self._capture(self._run_of(step, key))

    def __contains__(self, key: object) -> bool:
        return key in self._replays

    def _run_of(self, step: DeviceStep, key: GraphKey) -> Run:
        assert self._outputs is not None
        outputs = self._outputs

        def run() -> None:
            for buffer, tensor in zip(outputs, self._forward(step, key), strict=True):
                buffer[: key.num_tokens].copy_(tensor)

        return run

    def replay(self, key: GraphKey) -> ModelOutput:
        """Run the static step of this kind; its output is valid until the next replay."""
        assert self._outputs is not None
        self._replays[key]()
        hidden, logits = self._outputs
        return ModelOutput(hidden[: key.num_tokens], logits[: key.num_tokens])
