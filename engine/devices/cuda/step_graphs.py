"""CUDA graphs of steps: of decodes, in which every row has one new token or the same small number
of them, and of mixed steps (mixed_graphs.py).

A small model's decode step costs the host more time to launch than the device to run. A graph
launches it at once, over the same addresses each time. So there is one graph for each of a ladder
of batch sizes, and a step takes the next larger one: its padded rows have length 0 and slot −1,
read no key and write none. Steps with drafts have a ladder of their own, in which every row is
padded to the same number of tokens.

A graph holds the model's body, and of decodes the head, which writes its logits where the sampler
reads them, and the search for the likeliest tokens. Outside of it stays everything whose
operations, not only values, change from step to step: block copies, log-probabilities of prompts,
and the rest of sampling. The graphs share one memory pool and one set of output buffers: a step's
output stays there until the next replay, and steps run in the order of their launch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import product

import torch
from tqdm import tqdm

from ...errors import one_line
from ...sampling.draws import BestTokens
from ..steps import DeviceStep, GraphKey, ModelOutput
from .layers.kernels import Kernels

MAX_GRAPH_SIZE = 256
"""Maximum number of rows. A larger step has enough work to hide its launches."""
_GRAPH_SIZES = (1, 2, 4, *range(8, MAX_GRAPH_SIZE + 1, 8))
MAX_DRAFT_SIZE = 32
"""Maximum number of rows with drafts. Larger steps seldom have any, since they do not pay there."""

Run = Callable[[], None]
Capture = Callable[[Run], Run]
"""Records what `run` launches and returns a function that launches the same again. Without CUDA,
a stand-in may return `run` itself."""


Forward = Callable[[DeviceStep, GraphKey, torch.Tensor | None], ModelOutput]
"""Runs the model as a key says. Logits go to the tensor, if one is given. It reads only tensors at
fixed addresses."""


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


class StepGraphs:
    """The captured steps of one runner, over its static inputs."""

    def __init__(
        self,
        forward: Forward,
        static_step: Callable[[GraphKey], DeviceStep],
        capture: Capture,
        kernels: Kernels,
    ) -> None:
        """`static_step(key)` returns the tensors that every step of this kind reads."""
        self._forward = forward
        self._static_step = static_step
        self._capture = capture
        self._best_tokens = kernels.best_tokens
        self._replays: dict[GraphKey, Run] = {}
        self._outputs: ModelOutput | None = None
        self._mixed_hidden: torch.Tensor | None = None

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
            step = self._static_step(key)
            if self._outputs is None:
                blank = self._forward(step, key._replace(shared=False, adapted=False), None)
                self._outputs = ModelOutput(
                    torch.empty_like(blank.hidden),
                    torch.empty_like(blank.logits),
                    _allocate_best(blank.logits),
                )
            self._replays[key] = self._capture(self._run_of(step, key))

    @torch.inference_mode()
    def capture_mixed(self, sizes: Sequence[int], *, with_adapters: bool = False) -> None:
        """Capture mixed steps of these sizes, the largest first, and all of them once more if rows
        may have adapters. If one fails, there are none."""
        kinds = sorted({False, with_adapters})
        keys = [
            GraphKey(size, False, adapted, mixed=True)
            for size in sorted(sizes, reverse=True)
            for adapted in kinds
        ]
        replays: dict[GraphKey, Run] = {}
        for key in tqdm(keys, "capturing mixed graphs", unit="graph"):
            step = self._static_step(key)
            if self._mixed_hidden is None:
                blank = self._forward(step, key._replace(adapted=False), None)
                self._mixed_hidden = torch.empty_like(blank.hidden)
            replays[key] = self._capture(self._run_of_mixed(step, key))
        self._replays |= replays

    def __contains__(self, key: object) -> bool:
        return key in self._replays

    def __len__(self) -> int:
        return len(self._replays)

    def _run_of_mixed(self, step: DeviceStep, key: GraphKey) -> Run:
        assert self._mixed_hidden is not None
        hidden = self._mixed_hidden[: key.size]

        def run() -> None:
            hidden.copy_(self._forward(step, key, None).hidden)

        return run

    def _run_of(self, step: DeviceStep, key: GraphKey) -> Run:
        hidden, logits, best = self._outputs_of(key)

        def run() -> None:
            hidden.copy_(self._forward(step, key, logits).hidden)
            self._best_tokens(logits, *best)

        return run

    def _outputs_of(self, key: GraphKey) -> tuple[torch.Tensor, torch.Tensor, BestTokens]:
        """Return the part of the buffers that a step of decodes fills."""
        assert self._outputs is not None
        hidden, logits, best = self._outputs
        assert best is not None
        return hidden[: key.num_tokens], logits[: key.num_tokens], best.rows(key.num_tokens)

    def replay(self, key: GraphKey) -> ModelOutput:
        """Run the static step of this kind; its output is valid until the next replay."""
        self._replays[key]()
        if key.mixed:
            assert self._mixed_hidden is not None
            hidden = self._mixed_hidden[: key.size]
            return ModelOutput(hidden, hidden.new_empty(0))
        return ModelOutput(*self._outputs_of(key))


def _allocate_best(logits: torch.Tensor) -> BestTokens:
    """Allocate room for the best tokens of these rows. Ids and `finite` are one piece of memory, so
    that one copy brings both to the host."""
    num_rows = len(logits)
    memory = torch.zeros(9 * num_rows, dtype=torch.uint8, device=logits.device)
    ids, finite = memory[: 8 * num_rows].view(torch.int64), memory[8 * num_rows :].view(torch.bool)
    return BestTokens(torch.empty_like(logits[:, 0]), ids, finite)
