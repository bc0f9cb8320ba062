"""Step times that are estimated: from a model's shape and a table of GPUs, by the roofline.

    seconds = max(launch, weights / bandwidth, products / rate) + attention + all-reduce

Bandwidth and rate are what such kernels usually reach of the data sheet's. Nothing of this was
measured on the device that is planned for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ConfigurationError
from .step_times import StepShape

LAUNCH_SECONDS = 1.5e-3
"""Time of a step that computes next to nothing: the host, and launches in a graph."""
BANDWIDTH_SHARE, RATE_SHARE, ATTENTION_SHARE = 0.75, 0.5, 0.4
"""What is reached of the memory's bandwidth, of the products' rate, and of the latter in the
attention of chunks."""
REDUCE_SECONDS = 15e-6
"""Latency of an all-reduce between GPUs of a machine."""
RESERVE_BYTES = 2 * 2**30
"""Memory of a GPU that neither weights nor K and V take: activations, graphs, libraries."""


class Gpu(NamedTuple):
    """A GPU by its data sheet: memory in bytes, its bandwidth and the link's to other GPUs in
    bytes/s (one direction), and products of dense bfloat16 in FLOP/s."""

    memory: float
    bandwidth: float
    flops: float
    link: float


GPUS = {
    "A10": Gpu(24e9, 600e9, 125e12, 32e9),
    "A100-40GB": Gpu(40e9, 1555e9, 312e12, 300e9),
    "A100-80GB": Gpu(80e9, 2039e9, 312e12, 300e9),
    "B200": Gpu(180e9, 8000e9, 2250e12, 900e9),
    "H100": Gpu(80e9, 3350e9, 989e12, 450e9),
    "H200": Gpu(141e9, 4800e9, 989e12, 450e9),
    "L4": Gpu(24e9, 300e9, 121e12, 32e9),
    "L40S": Gpu(48e9, 864e9, 362e12, 32e9),
    "RTX-4090": Gpu(24e9, 1008e9, 165e12, 32e9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What of a model decides its step times. Sizes are of the whole model, in bytes.

    All parameters count as read by every step, those of experts too.
    """

    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    num_layers: int
    num_places: int
    """The number of layers for which a block of the KV cache has room."""
    hidden_size: int
    num_kv_heads: int
    num_attention_heads: int


@dataclass(frozen=True, slots=True)
class EstimatedTimes:
    """Step times of a model on `tp` GPUs of a kind."""

    model: ModelShape
    gpu: Gpu
    tp: int = 1

    def parts(self, shape: StepShape) -> dict[str, float]:
        model, gpu, tp = self.model, self.gpu, self.tp
        rate = gpu.flops * RATE_SHARE * tp
        bandwidth = gpu.bandwidth * BANDWIDTH_SHARE * tp
        weights = max(LAUNCH_SECONDS, model.weight_bytes / bandwidth)
        products = 2 * model.num_parameters * shape.tokens / rate
        # Key-value heads that are fewer than the GPUs are kept several times.
        copies = max(1.0, tp / model.num_kv_heads)
        context = shape.context * model.kv_bytes_per_token * copies / bandwidth
        pairs = 4 * shape.pairs * model.hidden_size * model.num_layers
        attention = context + pairs / (gpu.flops * ATTENTION_SHARE * tp)
        return {
            "launch and weights": weights,
            "tokens": max(products - weights, 0.0),
            "attention": attention,
            "all-reduce": self._all_reduce(shape.tokens),
        }

    def _all_reduce(self, tokens: int) -> float:
        """Return the time of two all-reduces for each layer, as a ring moves them."""
        if self.tp == 1:
            return 0.0
        moved = tokens * self.model.hidden_size * 2 * 2 * (self.tp - 1) / self.tp
        return 2 * self.model.num_layers * (REDUCE_SECONDS + moved / self.gpu.link)


def num_blocks(
    model: ModelShape, gpu: Gpu, tp: int, block_size: int, utilization: float = 0.9
) -> int:
    """Return how many blocks fit beside the weights into `utilization` of each GPU's memory; 0 or
    less if nothing does."""
    free = gpu.memory * utilization - model.weight_bytes / tp - RESERVE_BYTES
    share = model.kv_bytes_per_token * max(1 / tp, 1 / model.num_kv_heads)
    share *= model.num_places / model.num_layers
    return int(free // (share * block_size))


def check_tp(model: ModelShape, tp: int) -> None:
    """Raise ConfigurationError if the model's heads cannot be divided among so many GPUs."""
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    if heads % tp or (kv_heads % tp and tp % kv_heads):
        fitting = [
            one
            for one in (1, 2, 4, 8, 16, 32)
            if heads % one == 0 and (kv_heads % one == 0 or one % kv_heads == 0)
        ]
        raise ConfigurationError(
            f"the model's {heads} heads with {kv_heads} for K and V cannot be divided by {tp}: "
            f"choose a tensor-parallel size among {', '.join(map(str, fitting))}"
        )


def gpu_named(name: str) -> Gpu:
    """Return the GPU of this name, in any case. Raises ConfigurationError if it is not known."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise ConfigurationError(f"unknown GPU {name!r}: choose from {', '.join(GPUS)}, or calibrate")
