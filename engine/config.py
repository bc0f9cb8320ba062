"""Engine configuration: frozen once built; derived values are returned, never written back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .embedding_spec import NO_LAYOUT, EmbeddingSpec
from .errors import ConfigurationError

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
SchedulingPolicy = Literal["fcfs", "priority", "fair"]
Quantization = Literal["int8"]
KVCacheDType = Literal["auto", "fp8", "fp8_e4m3"]
PoolingChoice = Literal["auto", "last", "mean"]

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 16, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine process is started with; plain values, so that it crosses as JSON.

    Sizes are in tokens unless the name says otherwise. `None` means "derive it": from the model
    (`max_model_len`), by profiling (`num_blocks`), or from the device (`kv_cache_memory_bytes`,
    used on the CPU where there is no device memory to take a share of; `max_num_batched_tokens`,
    see `token_budget`; `async_scheduling`, to launch a step before the last one's results are
    known: on CUDA). Without a `seed`, requests that bring none draw theirs at random.
    """

    model: str
    dtype: DType = "auto"
    device: Device = "auto"
    load_format: LoadFormat = "auto"
    trust_remote_code: bool = False
    seed: int | None = None
    enforce_eager: bool = False
    max_model_len: int | None = None
    quantization: Quantization | None = None
    kv_cache_dtype: KVCacheDType = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    disable_cascade_attn: bool = False
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    scheduling_policy: SchedulingPolicy = "fcfs"
    async_scheduling: bool | None = None
    max_logprobs: int = 20
    num_threads: int | None = None
    pooling: PoolingChoice = "auto"

    def __post_init__(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise ConfigurationError(message)

        size = self.block_size
        require(
            MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE and size & (size - 1) == 0,
            f"block_size must be a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}, "
            f"not {size}",
        )
        require(
            self.scheduling_policy in get_args(SchedulingPolicy),
            f"unknown scheduling policy {self.scheduling_policy!r}",
        )
        require(
            self.quantization in (None, *get_args(Quantization)),
            f"unknown quantization {self.quantization!r}",
        )
        require(
            self.kv_cache_dtype in get_args(KVCacheDType),
            f"unknown KV cache dtype {self.kv_cache_dtype!r}",
        )
        require(self.max_num_seqs >= 1, "max_num_seqs must be at least 1")
        require(
            self.max_num_batched_tokens is None or self.max_num_batched_tokens >= 1,
            "max_num_batched_tokens must be at least 1",
        )
        require(
            self.max_model_len is None or self.max_model_len >= 2,
            "max_model_len must be at least 2",
        )
        require(self.num_blocks is None or self.num_blocks >= 1, "num_blocks must be at least 1")
        require(
            0.0 < self.gpu_memory_utilization <= 1.0,
            "gpu_memory_utilization must be above 0 and at most 1",
        )

    def token_budget(self, device: str) -> int:
        """Most tokens in a step on a device of this type. A GPU wants many to work on at once; a
        CPU is busy with a few hundred, and with more only lets all others wait."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(512, 2 * self.max_num_seqs) if device == "cpu" else 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the engine reports once it is ready; the HTTP side validates requests against it.

    `embedding` is how it makes embeddings, or why it makes none; without `can_generate` it makes
    nothing else, since its weights have no language-model head. `kv_cache_dtype` is None where it
    is `dtype`.
    """

    model: str
    architecture: str
    device: str
    dtype: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int
    max_num_seqs: int
    max_logprobs: int
    eos_token_ids: tuple[int, ...]
    embedding: EmbeddingSpec | str = NO_LAYOUT
    can_generate: bool = True
    kv_cache_dtype: str | None = None

    @property
    def kv_capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size
