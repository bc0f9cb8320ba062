"""What the engine is started with and what it reports once it is ready.

Each field of `EngineConfig` that a user can set is declared once, here, with its help, bounds and
flag name. Everything else follows from the declaration (`engine_flags`): the engine's fields of the
server's `Settings`, the engine arguments of `python -m quire.engine.bench`, and the rows of the
table of flags in docs/api.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, get_type_hints

from .classifier_spec import NO_CLASSIFIER, ClassifierSpec
from .embedding_spec import NO_LAYOUT, EmbeddingSpec
from .errors import ConfigurationError
from .flags.flag import EngineFlag
from .flags.flag import flag as _flag
from .flags.offloading import OffloadingConfig
from .layers.layer_groups import blocks_needed
from .lora import AdapterSource

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
Speculation = Literal["auto", "off", "ngram", "model"]
SchedulingPolicy = Literal["fcfs", "priority", "fair"]
Quantization = Literal["int8", "int4"]
KVCacheDType = Literal["auto", "float32", "float16", "bfloat16", "int8", "fp8", "fp8_e4m3"]
PoolingChoice = Literal["auto", "last", "mean"]

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 16, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(OffloadingConfig):
    """The engine's configuration: plain values, so that it can be sent to the engine process.

    It is frozen; derived values are returned, never written back. Sizes are in tokens unless the
    name says otherwise. None means that the engine derives the value.
    """

    model: str
    dtype: DType = _flag(
        "Model",
        "Data type of the weights and activations.",
        "auto",
        details="auto is float32 on the CPU, on a GPU the checkpoint's (bfloat16 for float32). "
        "The KV cache has it too unless `--kv-cache-dtype` says otherwise.",
    )
    deterministic: bool = _flag(
        "Model", "Answer the same to the bit whatever else is served, or do not start.", False
    )
    gguf_file: str | None = _flag(
        "Model",
        "GGUF file to serve, in the folder or hub repository MODEL.",
        None,
        details="MODEL may also be the path of a GGUF file itself. Needs `quire-server[gguf]`.",
    )
    quantization: Quantization | None = _flag(
        "Model",
        "Round the weights of linear layers and experts to 8 or 4 bits: int8 or int4 (CPU).",
        None,
        details="They are rounded when they are loaded: to 8 bits with a scale for each column, to "
        "4 bits with a scale and a minimum for each 32 weights, the head to 8 bits. Products are "
        "in integers: their inputs are rounded to 8 bits, 32 at a time. A step reads a quarter or "
        "a sixth of float32's bytes. Small models lose much by 4 bits. A checkpoint that is "
        "quantised already keeps its weights.",
    )
    device: Device = _flag("Model", "Device to run on.", "auto")
    max_model_len: int | None = _flag(
        "Model", "Context length in tokens. Default: the model's.", None, ge=2, le=2**24
    )
    load_format: LoadFormat = _flag(
        "Model",
        "auto reads safetensors; dummy fills the model's shape with random weights.",
        "auto",
    )
    seed: int | None = _flag(
        "Model", "Seed for dummy weights and for requests that bring none.", None
    )
    enforce_eager: bool = _flag(
        "Model",
        "Disable CUDA graphs.",
        False,
        details="Starts faster and decodes more slowly.",
    )
    max_cudagraph_capture_size: int | None = _flag(
        "Model",
        "Maximum tokens of a step with prompts that is captured as a CUDA graph; 0 for none.",
        None,
        details="Default: 10¹² divided by the model's parameters, at most 2048, since larger steps "
        "compute for longer than their launches take. Steps of decodes alone are captured up to "
        "256 sequences.",
        ge=0,
        le=2**20,
    )
    enable_pdl: bool = _flag(
        "Model",
        "Launch small kernels before those that they follow have ended (GPU).",
        False,
        details="Programmatic dependent launch, from compute capability 9.0 on. It has been "
        "compiled, but not yet run on a GPU.",
    )
    trust_remote_code: bool = _flag("Model", "Run code found in the model's folder.", False)
    num_threads: int | None = _flag("Model", "CPU threads of the engine.", None, ge=1)
    score_tokens: str | None = _flag(
        "Model",
        "Token, or two with a comma (yes,no), whose logits are the score of a reranker.",
        None,
        details="See Rerank, score and classify. Default: as the model's folder says.",
    )
    enable_lora: bool = _flag("Model", "Serve LoRA adapters. On with --lora or --lora-dir.", False)
    lora: tuple[AdapterSource, ...] = ()
    """The adapters that are loaded when the engine starts."""
    skip_broken_lora: bool = False
    """Whether to start without an adapter that cannot be loaded: after a restart."""
    lowers_max_num_seqs: bool = False
    """Whether fewer sequences run if the states of max_num_seqs leave too little for blocks."""
    num_peers: int = 1
    """Engines that share this machine's main memory, this one included."""
    max_loras: int = _flag(
        "Model",
        "Maximum different LoRA adapters in a step.",
        4,
        details="Requests for others wait. Each takes the memory of one with the maximum rank.",
        ge=1,
        le=256,
    )
    max_lora_rank: int | None = _flag(
        "Model",
        "Maximum rank of a LoRA adapter. Default: the largest of --lora, at least 16.",
        None,
        ge=1,
        le=1024,
    )
    max_cpu_loras: int = _flag("Model", "Maximum LoRA adapters loaded at a time.", 64, ge=1)
    pooling: PoolingChoice = _flag(
        "Model",
        "Pooling of embeddings: auto (as the model's folder says), last or mean token.",
        "auto",
        details="See Embeddings.",
    )

    gpu_memory_utilization: float = _flag(
        "KV cache",
        "Share of the GPU's memory to use in total, weights included.",
        0.9,
        gt=0,
        le=1,
    )
    kv_cache_memory_bytes: int | None = _flag(
        "KV cache",
        "Size of the KV cache, such as 2GiB. Default: what the device leaves free.",
        None,
        details="On a GPU a given size replaces `--gpu-memory-utilization`. In main memory a given "
        "size is allocated when the engine starts, the default size as it is first written.",
        name="kv_cache_memory",
        is_size=True,
    )
    kv_cache_dtype: KVCacheDType = _flag(
        "KV cache",
        "Data type of the KV cache: auto, float32, float16, bfloat16 or int8 (CPU), fp8 or "
        "fp8_e4m3 (GPU).",
        "auto",
        details="auto is the model's dtype; on the CPU, if `--dtype` is auto too, it is float16 "
        "for a model that this changes by less than 0.001. int8 has a scale for each token and "
        "head, in almost a quarter of float32's bytes. fp8 and fp8_e4m3 are the same: half the "
        "bytes of bfloat16, at the cost of some accuracy. Calibrated scales (`k_scale`, `v_scale`) "
        "are read from the checkpoint; without them the scales are 1.",
    )
    block_size: int = _flag("KV cache", "Tokens per block: 16, 32, 64 or 128.", 16)
    num_blocks: int | None = _flag(
        "KV cache",
        "Number of blocks. Default: as many as the memory holds.",
        None,
        name="num_gpu_blocks_override",
        ge=1,
        le=2**31 - 1,  # block tables hold 32-bit integers
    )
    enable_prefix_caching: bool = _flag("KV cache", "Share the blocks of equal prefixes.", True)
    disable_cascade_attn: bool = _flag(
        "KV cache",
        "Disable cascade attention for shared prefixes.",
        False,
        details="With cascade attention, a decode step reads a shared prefix once for several "
        "sequences, on a GPU and if that saves time.",
    )
    kv_events_config: str | None = _flag(
        "KV cache",
        "Where to publish which blocks are cached, as JSON with the fields of vLLM's flag.",
        None,
        details="See Block events in docs/operations.md.",
    )

    max_num_seqs: int = _flag("Scheduling", "Maximum sequences per step.", 256, ge=1, le=2**16)
    max_num_batched_tokens: int | None = _flag(
        "Scheduling",
        "Maximum tokens per step. Default: 8192; on the CPU 512, or twice --max-num-seqs if that "
        "is more.",
        None,
        details="A running stream waits at most one step for its next token.",
        ge=1,
        le=2**20,
    )
    scheduling_policy: SchedulingPolicy = _flag(
        "Scheduling",
        "Order of waiting requests: fcfs (by arrival), priority, or fair (the least served key "
        "and user first).",
        "fcfs",
    )
    speculation: Speculation = _flag(
        "Scheduling",
        "Draft tokens and verify them in one step: auto, off, ngram or model.",
        "auto",
        details="The tokens are the same with and without drafts. auto: where results are equal to "
        "the bit however many tokens a step has (compiled layers on the CPU); ngram: always; "
        "model: always, also by `--speculative-model`, which chooses it. See Speculation.",
    )
    speculative_model: str | None = _flag(
        "Scheduling",
        "Small model that drafts tokens, with the vocabulary of MODEL: a folder, hub id or file.",
        None,
    )
    num_speculative_tokens: int = _flag("Scheduling", "Tokens of a draft at most.", 15, ge=1, le=31)
    async_scheduling: bool | None = _flag(
        "Scheduling",
        "Launch a step before the results of the previous one are known. Default: only on CUDA.",
        None,
        details="The tokens are the same. While a beam search runs, or drafts are made, each step "
        "waits for the previous results.",
    )

    max_logprobs: int = _flag("Limits", "Maximum log-probabilities per position.", 20, ge=0)

    def runs_ahead(self, is_asynchronous: bool) -> bool:
        """Whether steps are launched before the results of the previous one are known."""
        return is_asynchronous if self.async_scheduling is None else self.async_scheduling

    def __post_init__(self) -> None:
        for flag in engine_flags():
            flag.check(getattr(self, flag.field))
        self.check_ranks()
        self.check_offloading(enable_prefix_caching=self.enable_prefix_caching)
        if len(self.lora) > self.max_cpu_loras:
            raise ConfigurationError(
                f"{len(self.lora)} LoRA adapters are more than --max-cpu-loras {self.max_cpu_loras}"
            )
        if self.speculation == "model" and self.speculative_model is None:
            raise ConfigurationError("--speculation model needs a --speculative-model")
        if self.num_ranks > 1 and (self.deterministic or self.speculative_model is not None):
            name = "--deterministic" if self.deterministic else "--speculative-model"
            raise ConfigurationError(f"{name} works only with a model on one device")
        if self.speculation in ("off", "ngram") and self.speculative_model is not None:
            raise ConfigurationError(f"--speculation {self.speculation} has no draft model")
        low, high, size = MIN_BLOCK_SIZE, MAX_BLOCK_SIZE, self.block_size
        if not (low <= size <= high and size & (size - 1) == 0):
            message = f"--block-size must be a power of two from {low} to {high}, not {size}"
            raise ConfigurationError(message)


@cache
def engine_flags() -> tuple[EngineFlag, ...]:
    """Return the flags of `EngineConfig` in the order of their declaration."""
    types = get_type_hints(EngineConfig)
    return tuple(
        EngineFlag(
            field=item.name,
            type=types[item.name],
            default=item.default,
            **{**item.metadata, "name": item.metadata["name"] or item.name},
        )
        for item in fields(EngineConfig)
        if item.metadata
    )


SNAPSHOT_SHARE = 4
"""The KV cache's blocks have so many times the bytes of the snapshots of states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """Facts about the loaded model that are known before its KV cache is sized.

    `max_model_len` is resolved, in tokens: the configured length, or else the model's own.
    `kv_bytes_per_token` covers K and V of all layers. `embedding` describes how the model makes
    embeddings, or says why it makes none, and so does `classifier` for scores. `can_generate` is
    False if the weights have no language-model head, so that the model makes only embeddings or
    scores. `max_num_batched_tokens` is the maximum number of tokens in a step. `is_asynchronous`
    says that the device computes a step while the host prepares the next. `kv_cache_dtype` is None
    if it equals `dtype`. `source_format` is that of the checkpoint, and `computed_format` names the
    types of the weights as they are computed, which take `weight_bytes`. `adapters` are the LoRA
    adapters that are loaded, and `max_lora_rank` is None if there can be none. `is_batch_invariant`
    says that logits are the same to the bit whatever else is in their step. `group_windows` has for
    each group of layers with block tables of its own how many of the latest tokens it keeps, None
    for all, and `group_layers` how many layers it has. `content` is a hash of the model's
    configuration and weights. What begins with `draft_` is the draft model's, and 0 without one.
    `state_bytes` is what the layers that keep a state, if there are any, keep for one sequence.
    """

    architecture: str
    device: str
    dtype: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    kv_bytes_per_token: int
    max_num_batched_tokens: int
    is_asynchronous: bool
    eos_token_ids: tuple[int, ...]
    embedding: EmbeddingSpec | str = NO_LAYOUT
    classifier: ClassifierSpec | str = NO_CLASSIFIER
    can_generate: bool = True
    kv_cache_dtype: str | None = None
    source_format: str = ""
    computed_format: str = ""
    weight_bytes: int = 0
    adapters: tuple[AdapterSource, ...] = ()
    max_lora_rank: int | None = None
    is_batch_invariant: bool = False
    draft_weight_bytes: int = 0
    draft_kv_bytes_per_token: int = 0
    group_windows: tuple[int | None, ...] = (None,)
    group_layers: tuple[int, ...] = ()
    content: str = ""
    state_bytes: int = 0

    def state_interval(self, block_size: int) -> int:
        """Return after how many tokens another snapshot of a sequence's state is due: whole blocks
        that take at least as many bytes as a snapshot."""
        return -(-self.state_bytes // (block_size * self.kv_bytes_per_token)) * block_size

    def state_snapshots(self, config: EngineConfig, num_blocks: int) -> int:
        """Return how many snapshots of states may be kept: as many as take a quarter of the bytes
        of `num_blocks` blocks. There are none without a prefix cache."""
        if not (self.state_bytes and config.enable_prefix_caching):
            return 0
        size = num_blocks * config.block_size * self.kv_bytes_per_token
        return size // (SNAPSHOT_SHARE * self.state_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo(WorkerInfo):
    """What the engine reports once it is ready, against which the HTTP side validates requests."""

    model: str
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_logprobs: int
    max_loras: int = 0
    speculates: bool = False
    keeps_evicted: bool = False
    seed: int | None = None
    step_tokens: int = 0
    """Maximum number of tokens of the steps whose results have not arrived."""

    @classmethod
    def of(cls, config: EngineConfig, worker: WorkerInfo, num_blocks: int) -> EngineInfo:
        """Combine the configuration, the loaded model's facts and the size of its KV cache."""
        loaded: dict[str, Any] = {item.name: getattr(worker, item.name) for item in fields(worker)}
        ahead = config.runs_ahead(worker.is_asynchronous)
        return cls(
            **loaded,
            model=config.model,
            block_size=config.block_size,
            num_blocks=num_blocks,
            seed=config.seed,
            step_tokens=worker.max_num_batched_tokens * (1 + ahead),
            max_num_seqs=config.max_num_seqs,
            max_logprobs=min(config.max_logprobs, worker.vocab_size),
            keeps_evicted=config.kv_offloading_size is not None,
            max_loras=config.max_loras if worker.max_lora_rank is not None else 0,
            speculates=config.speculation in ("ngram", "model")
            or config.speculative_model is not None
            or (
                config.speculation == "auto"
                and worker.is_batch_invariant
                and not worker.state_bytes  # which cannot be rewound
            ),
        )

    @property
    def layers_by_window(self) -> dict[int | None, int]:
        """How many layers keep so many of the latest tokens; None stands for all tokens."""
        found: dict[int | None, int] = {}
        for window, layers in zip(self.group_windows, self.group_layers, strict=False):
            found[window] = found.get(window, 0) + layers
        return found

    @property
    def kv_capacity_tokens(self) -> int:
        """The tokens that the KV cache holds; of sequences of max_model_len, if groups differ."""
        if self.group_windows == (None,):
            return self.num_blocks * self.block_size
        each = blocks_needed(self.group_windows, self.block_size, self.max_model_len)
        return self.num_blocks * self.max_model_len // each
