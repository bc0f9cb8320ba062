"""Everything that `quire serve` can be told: flag > environment `QUIRE_*` > YAML file > default."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)
from yaml import YAMLError

from ..engine.config import (
    Device,
    DType,
    EngineConfig,
    KVCacheDType,
    LoadFormat,
    PoolingChoice,
    Quantization,
    SchedulingPolicy,
)
from ..engine.errors import ConfigurationError

DEMO_MODEL_NAME = "quire-demo"

GROUPS = ("Server", "Model", "KV cache", "Scheduling", "Limits", "Logging and metrics")


def _option(group: str, help: str, default: Any = None, **constraints: Any) -> Any:
    """A field that the command line lists under `group`."""
    return Field(default, description=help, json_schema_extra={"group": group}, **constraints)


ToolCallParser = Literal[
    "auto",
    "none",
    "hermes",
    "llama3_json",
    "pythonic",
    "mistral",
    "deepseek_v3",
    "openai",
    "harmony",
]
ReasoningParser = Literal["auto", "none", "qwen3", "deepseek_r1", "openai_gptoss", "harmony"]
"""`harmony` is another name of openai and openai_gptoss, which are vLLM's."""
NameList = Annotated[tuple[str, ...], NoDecode]
"""Repeatable as a flag, comma-separated in the environment, a list in YAML."""


class Settings(BaseSettings):
    """One field for each flag. Frozen; derived values are properties.

    Build it with `load_settings`, which turns every mistake into a ConfigurationError.
    """

    model_config = SettingsConfigDict(
        env_prefix="QUIRE_", extra="forbid", frozen=True, env_ignore_empty=True
    )

    model: str | None = Field(
        None, description="Hugging Face name or folder; the built-in demo model if left out."
    )
    config: Path | None = Field(None, description="YAML file with the same names as the flags.")

    host: str = _option("Server", "Address to listen on.", "127.0.0.1")
    port: int = _option("Server", "Port to listen on; 0 takes any free one.", 8000, ge=0, le=65535)
    uds: str | None = _option("Server", "Listen on this unix socket instead of host and port.")
    http_workers: int = _option(
        "Server", "HTTP processes that share the port and the engine.", 1, ge=1, le=64
    )
    api_key: NameList = _option(
        "Server", "Key that clients must send as a Bearer token; repeatable.", ()
    )
    admin_api_key: str | None = _option("Server", "Key of the admin endpoints; off without it.")
    served_model_name: NameList = _option(
        "Server", "Name that clients ask for; repeatable, the first is echoed. Default: MODEL.", ()
    )
    root_path: str = _option("Server", "Path prefix under which a proxy serves this.", "")
    allowed_origins: NameList = _option("Server", "Origins allowed by CORS; repeatable.", ())
    ssl_keyfile: Path | None = _option("Server", "TLS private key (PEM).")
    ssl_certfile: Path | None = _option("Server", "TLS certificate chain (PEM).")
    shutdown_timeout: float = _option(
        "Server", "Seconds that running requests get after SIGTERM.", 30.0, ge=0
    )
    sse_keepalive_interval: float = _option(
        "Server", "Seconds of silence before a stream sends a comment; 0 is off.", 15.0, ge=0
    )
    stream_stall_timeout: float = _option(
        "Server",
        "Seconds that a stream's reader may read nothing before its request is aborted.",
        30.0,
        gt=0,
    )
    stream_resume_ttl: float = _option(
        "Server", "Seconds that a resumable stream waits for its client; 0 is off.", 60.0, ge=0
    )

    dtype: DType = _option("Model", "Type of weights and KV cache.", "auto")
    quantization: Quantization | None = _option(
        "Model", "int8: round the weights of linear layers to 8 bits (CPU)."
    )
    device: Device = _option("Model", "Where to run.", "auto")
    max_model_len: int | None = _option(
        "Model", "Context length in tokens. Default: the model's.", ge=2
    )
    load_format: LoadFormat = _option("Model", "dummy fills the shape with random weights.", "auto")
    seed: int | None = _option("Model", "Seed of dummy weights and of requests without one.", None)
    enforce_eager: bool = _option("Model", "Capture no CUDA graphs of decode steps.", False)
    trust_remote_code: bool = _option("Model", "Run code found in the model's folder.", False)
    tensor_parallel_size: int = _option("Model", "Number of GPUs; only 1 works today.", 1)
    num_threads: int | None = _option("Model", "CPU threads of the engine.", ge=1)
    chat_template: str | None = _option("Model", "Jinja chat template: a file or the text itself.")
    tool_call_parser: ToolCallParser = _option(
        "Model", "Format of tool calls; auto: by the chat template.", "auto"
    )
    reasoning_parser: ReasoningParser = _option(
        "Model", "Format of reasoning; auto: by the chat template.", "auto"
    )
    trust_request_chat_template: bool = _option(
        "Model", "Accept a chat_template inside a request.", False
    )
    generation_config: str = _option(
        "Model", "Defaults of sampling: auto (the model's), none, or a folder.", "auto"
    )
    pooling: PoolingChoice = _option(
        "Model", "Pooling of embeddings: auto (as the folder says), last or mean token.", "auto"
    )

    gpu_memory_utilization: float = _option(
        "KV cache", "Share of the GPU's memory to use in all.", 0.9, gt=0, le=1
    )
    kv_cache_memory: ByteSize | None = _option(
        "KV cache", "Size of the KV cache, such as 2GiB. Default: what the device leaves free."
    )
    kv_cache_dtype: KVCacheDType = _option(
        "KV cache", "Type of the KV cache: auto (the model's), fp8 or fp8_e4m3 (GPU).", "auto"
    )
    block_size: int = _option("KV cache", "Tokens in a block: 16, 32, 64 or 128.", 16)
    num_gpu_blocks_override: int | None = _option(
        "KV cache", "Number of blocks, instead of measuring.", ge=1
    )
    enable_prefix_caching: bool = _option("KV cache", "Share blocks of equal prefixes.", True)
    disable_cascade_attn: bool = _option(
        "KV cache", "Have each decode read a prefix that it shares by itself.", False
    )

    max_num_seqs: int = _option("Scheduling", "Most sequences in a step.", 256, ge=1)
    max_num_batched_tokens: int | None = _option(
        "Scheduling",
        "Most tokens in a step. Default: 8192, on the CPU 512 or twice --max-num-seqs.",
        ge=1,
    )
    scheduling_policy: SchedulingPolicy = _option(
        "Scheduling", "Order of waiting requests.", "fcfs"
    )
    async_scheduling: bool | None = _option(
        "Scheduling", "Launch a step before the last one's results are known. Default: on CUDA."
    )
    max_num_queued_reqs: int | None = _option(
        "Scheduling", "Waiting requests beyond which new ones get 429.", 1024, ge=0
    )
    max_num_queued_tokens: int | None = _option(
        "Scheduling", "Waiting prompt tokens beyond which new requests get 429.", ge=0
    )
    queue_timeout: float | None = _option(
        "Scheduling", "Seconds that a request may wait for its first step.", 300.0, gt=0
    )
    request_timeout: float | None = _option(
        "Scheduling", "Seconds that a request may take in all.", 1200.0, gt=0
    )
    engine_stall_timeout: float = _option(
        "Scheduling", "Seconds without a finished step before the engine is restarted.", 120.0, gt=0
    )

    max_logprobs: int = _option("Limits", "Most log-probabilities per position.", 20, ge=0)
    max_n: int = _option("Limits", "Largest n and best_of.", 128, ge=1)
    max_prompts_per_request: int = _option("Limits", "Most prompts in one request.", 256, ge=1)
    max_body_bytes: ByteSize = _option("Limits", "Largest request body.", "16MiB", gt=0)
    max_stored_responses: int = _option(
        "Limits", "Most stored answers of /v1/responses; 0 stores none.", 1024, ge=0
    )
    max_stored_response_bytes: ByteSize = _option(
        "Limits", "JSON of the stored responses in all.", "64MiB", gt=0
    )
    stored_response_ttl: float = _option(
        "Limits", "Seconds that a response stays stored.", 3600.0, gt=0
    )
    strict: bool = _option("Limits", "Refuse unknown request fields instead of naming them.", False)

    log_level: Literal["debug", "info", "warning", "error"] = _option(
        "Logging and metrics", "Least severe messages to log.", "info"
    )
    log_format: Literal["auto", "console", "json"] = _option(
        "Logging and metrics", "auto: console on a terminal, json elsewhere.", "auto"
    )
    enable_log_requests: bool = _option("Logging and metrics", "One line per request.", False)
    metrics_prefix: Literal["quire", "vllm"] = _option(
        "Logging and metrics", "Prefix of metric names; vllm fits dashboards made for it.", "quire"
    )

    @field_validator("api_key", "served_model_name", "allowed_origins", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value

    @field_validator(
        "max_body_bytes", "max_stored_response_bytes", "kv_cache_memory", mode="before"
    )
    @classmethod
    def _refuse_bool(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be a size, such as 16MiB")
        return value

    @field_validator("port", mode="before")
    @classmethod
    def _explain_service_links(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("tcp://"):
            raise ValueError(
                f"{value} is no port. Kubernetes sets QUIRE_PORT so in pods beside a Service named "
                "quire: set enableServiceLinks: false in the pod's spec, give --port, or name the "
                "Service otherwise"
            )
        return value

    @field_validator("tensor_parallel_size")
    @classmethod
    def _one_gpu(cls, value: int) -> int:
        if value != 1:
            raise ValueError(f"only 1 is supported in this release, not {value}")
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> Settings:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile go together")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = init_settings().get("config") or env_settings().get("config")
        if path is None:
            return init_settings, env_settings
        # The source passes over a missing file in silence.
        if not Path(path).is_file():
            raise ConfigurationError(f"config: there is no file {path}")
        try:
            from_file = YamlConfigSettingsSource(settings_cls, Path(path))
        except (OSError, ValueError, TypeError, YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigurationError(f"config: cannot read {path}: {reason}") from error
        return init_settings, env_settings, from_file

    @property
    def model_path(self) -> str:
        """What the engine and the tokenizer load."""
        if self.model is not None:
            return self.model
        return str(files("quire.configs") / "demo")

    @property
    def is_demo(self) -> bool:
        return self.model is None

    @property
    def served_names(self) -> tuple[str, ...]:
        """Names accepted as `model`, never empty; answers carry the first."""
        return self.served_model_name or (self.model or DEMO_MODEL_NAME,)

    def engine_config(self) -> EngineConfig:
        """The engine's share. Raises ConfigurationError."""
        memory = self.kv_cache_memory
        return EngineConfig(
            model=self.model_path,
            dtype=self.dtype,
            device=self.device,
            load_format=self.load_format,
            trust_remote_code=self.trust_remote_code,
            seed=self.seed,
            enforce_eager=self.enforce_eager,
            max_model_len=self.max_model_len,
            quantization=self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            block_size=self.block_size,
            num_blocks=self.num_gpu_blocks_override,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_memory_bytes=None if memory is None else int(memory),
            enable_prefix_caching=self.enable_prefix_caching,
            disable_cascade_attn=self.disable_cascade_attn,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            scheduling_policy=self.scheduling_policy,
            async_scheduling=self.async_scheduling,
            max_logprobs=self.max_logprobs,
            num_threads=self.num_threads,
            pooling=self.pooling,
        )


def load_settings(**flags: Any) -> Settings:
    """Settings from `flags`, the environment and the YAML file. Raises ConfigurationError."""
    try:
        return Settings(**flags)
    except ValidationError as error:
        problems = [_describe(dict(item)) for item in error.errors(include_url=False)]
        raise ConfigurationError("; ".join(problems)) from error


def _describe(item: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{name}: there is no such setting"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{name}: {message}" if name else message
