"""Parts that the GPU benchmarks share: cases, timing by CUDA graphs, paged inputs."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams
from quire.engine.sequence import Rank, Sequence
from quire.engine.step import SequenceSpec

Record = dict[str, Any]
DEVICE = "cuda"


class Case(NamedTuple):
    """One measurement or check. Its record must be JSON; an exception is recorded too."""

    name: str
    run: Callable[[], Record]


class Shape(NamedTuple):
    """The attention shape of a model."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_width: int | None = None
    """The numbers of a key that are its value, if heads share a latent."""


LLAMA_8B = Shape("llama-3.1-8b", 32, 8, 128)
QWEN_06B = Shape("qwen3-0.6b", 16, 8, 128)
GEMMA_26B = Shape("gemma-4-26b, full layers", 16, 2, 512)


def time_graph(calls: list[Callable[[], object]], replays: int = 9) -> float:
    """Return the median seconds per call when a CUDA graph of all calls is replayed."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(calls)


def capture(launch: Callable[[], None]) -> Callable[[], None]:
    """Capture `launch` into a CUDA graph and return the function that replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


@dataclass(frozen=True)
class PagedBatch:
    """Random caches `[num_layers, 2, …]`, or `[num_layers, 1, …]` of latents, and the block tables
    of a batch of sequences."""

    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    kv_bytes: int
    """Bytes of K and V that one layer's decode must read."""

    @property
    def num_layers(self) -> int:
        """Number of layers in the cache."""
        return self.kv_cache.shape[0]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the K and the V cache of layer `index`, counted round and round; no V of
        latents."""
        layer = self.kv_cache[index % self.num_layers]
        return layer[0], layer[1] if len(layer) == 2 else None


@functools.lru_cache(maxsize=1)
def paged_batch(
    shape: Shape,
    block_size: int,
    lengths: tuple[int, ...],
    *,
    shared: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    in_order: bool = False,
) -> PagedBatch:
    """Make random caches of `dtype` for sequences of these lengths.

    There are enough layers that 256 MB are read before a layer is read again (more than L2 holds),
    but at most 64. All sequences have their first `shared` tokens, in whole blocks, in common. The
    blocks of a sequence are scattered, or consecutive if `in_order`.
    """
    common = shared // block_size
    needed = [-(-length // block_size) for length in lengths]
    num_blocks = common + sum(count - common for count in needed)
    parts = 2 if shape.value_width is None else 1
    token_bytes = parts * dtype.itemsize * shape.num_kv_heads * shape.head_dim
    layer_bytes = num_blocks * block_size * token_bytes
    num_layers = max(2, min(64, -(-256_000_000 // layer_bytes)))
    size = (parts, num_blocks, shape.num_kv_heads, block_size, shape.head_dim)
    kv_cache = torch.empty(num_layers, *size, dtype=dtype, device=DEVICE)
    for layer in kv_cache:  # torch draws no float8
        layer.copy_(torch.randn(size, dtype=torch.bfloat16, device=DEVICE))
    order = torch.randperm(num_blocks, device=DEVICE, dtype=torch.int32)
    if in_order:
        order = order.sort().values
    table = torch.zeros(len(lengths), max(needed), dtype=torch.int32, device=DEVICE)
    first = common
    for row, count in enumerate(needed):
        table[row, :common] = order[:common]
        table[row, common:count] = order[first : first + count - common]
        first += count - common
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return PagedBatch(kv_cache, table, seq_lens, sum(lengths) * token_bytes)


def make_sequence(index: int, params: dict[str, float]) -> SequenceSpec:
    """Make a sequence to sample with these parameters and a seed of its own."""
    request = Request(
        request_id=str(index),
        prompt_token_ids=(1, 2, 3),
        sampling_params=SamplingParams(max_tokens=64, **params),  # type: ignore[arg-type]
        arrival_time=0.0,
    )
    seed = int(torch.randint(2**62, (1,)))
    return Sequence(request, 0, seed, Rank(0, index, 0), frozenset()).spec()


def mixed_lengths(count: int, low: int, high: int, seed: int = 0) -> tuple[int, ...]:
    """Return `count` uniform random lengths, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(low, high + 1, (count,), generator=generator).tolist())
