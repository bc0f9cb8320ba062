"""What each point of the CUDA path is worth: an engine as it is, and engines that do one thing the
old way, on the same workloads.

The engines have few graphs, so that each starts in seconds: up to 32 sequences. Differences of one
step in a hundred are within the noise of short runs, so that each part decodes 200 steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from gpu_workloads import Bench, Result

from quire.engine.body import rotary_table
from quire.engine.devices.cuda.layers import kernels as cuda_kernels
from quire.engine.devices.cuda.step_graphs import StepGraphs
from quire.kernels import device_copy

MAX_SEQS = 32
STEPS = 200


class Point(NamedTuple):
    """An engine with these options, and patches while it runs; `online` says that prompts beside
    decodes are what it is about."""

    name: str
    options: dict[str, Any] = {}
    patched: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    online: bool = False


@contextlib.contextmanager
def _best_tokens_outside() -> Iterator[None]:
    """Let the sampler look for the likeliest tokens, and no graph."""
    replay = StepGraphs.replay
    kernels = cuda_kernels.TRITON._replace(best_tokens=lambda *_: None)
    with (
        mock.patch.object(
            StepGraphs, "replay", lambda graphs, key: replay(graphs, key)._replace(best=None)
        ),
        mock.patch.object(cuda_kernels, "TRITON", kernels),
    ):
        yield


def _copies_in_the_same_stream() -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(device_copy, "_copy_stream", torch.cuda.current_stream)


def _rotary_factors_in_each_step() -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(rotary_table, "MAX_BYTES", 0)


POINTS = (
    Point("as it is", online=True),
    Point("no mixed graphs", {"max_cudagraph_capture_size": 0}, online=True),
    Point("rotary each step", patched=_rotary_factors_in_each_step),
    Point("argmax outside", patched=_best_tokens_outside),
    Point("same stream", patched=_copies_in_the_same_stream),
    Point("pdl", {"enable_pdl": True}),
)
"""The first is what the others are compared with."""


def parts(bench: Bench, point: Point) -> list[tuple[str, Callable[[], Result], float]]:
    """Return what is measured of an engine: decodes of one sequence and of many, and for some an
    online load."""
    short, many = bench.sizes.contexts[0], min(MAX_SEQS, bench.sizes.batches[-1])
    bench.sizes = bench.sizes._replace(steps=min(STEPS, 50 * bench.sizes.steps))
    found: list[tuple[str, Callable[[], Result], float]] = [
        (f"decode {count}x{short}", lambda count=count: bench.decode(count, short), 5)  # type: ignore[misc]
        for count in (1, many)
    ]
    if point.online:
        total, at_once, prompt, output = bench.sizes.online
        chats = (2 * total, at_once, prompt // 8, output // 2)
        found += [
            (f"online {total} by {at_once}", bench.online, 10),
            (f"online {chats[0]} by {at_once}", lambda: _online(bench, chats), 10),
        ]
    return found


def _online(bench: Bench, load: tuple[int, int, int, int]) -> Result:
    """Run the online workload with another load, as `Sizes.online` has it."""
    before = bench.sizes
    bench.sizes = before._replace(online=load)
    try:
        return bench.online()
    finally:
        bench.sizes = before
