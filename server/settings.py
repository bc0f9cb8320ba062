"""Every setting of `quire serve`. A flag wins over the environment (`QUIRE_*`), which wins over the
YAML file, which wins over the default.

The settings of the engine are not listed here: they are made from the declarations in
`quire.engine.config`. To add a setting of the server, add a field to `Settings`; to add one of the
engine, add a field to `EngineConfig`. The command line (`quire.server.cli`) and the table of flags
in docs/api.md (`quire.server.flags_table`) follow.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    ByteSize,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ..engine.config import EngineConfig, engine_flags
from ..engine.errors import ConfigurationError
from ..engine.events.kv_config import read_kv_events
from ..engine.lora import AdapterSource, read_sources
from .setting_sources import origins_of, read_file
from .setting_types import (
    KeySettings,
    ReasoningParser,
    ToolCallParser,
    TracesEndpoint,
    refuse_empty_keys,
    take_speculative_config,
)
from .setting_types import option as _option

DEMO_MODEL_NAME = "quire-demo"

GROUPS = (
    "Server",
    "Model",
    "KV cache",
    "Scheduling",
    "Parallelism",
    "Limits",
    "Logging and metrics",
)
"""Headings of `quire serve --help`, in their order."""


def _engine_options() -> dict[str, Any]:
    """Return a pydantic field for each flag of EngineConfig, keyed by the flag's name."""
    return {
        flag.name: (
            ByteSize | None if flag.is_size else flag.type,
            _option(
                flag.group,
                flag.help,
                flag.default,
                details=flag.details,
                ge=flag.ge,
                gt=flag.gt,
                le=flag.le,
            ),
        )
        for flag in engine_flags()
    }


if TYPE_CHECKING:
    # A type checker does not see the engine's settings: read them from `Settings.engine_config()`.
    _EngineSettings = KeySettings
else:
    _EngineSettings = create_model("_EngineSettings", __base__=KeySettings, **_engine_options())


NameList = Annotated[tuple[str, ...], NoDecode]
"""Names that are a repeatable flag, comma-separated in the environment and a list in YAML."""


_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")


class Settings(_EngineSettings):
    """One field for each flag of `quire serve`, frozen; derived values are properties.

    Build it with `load_settings`, which turns every mistake into a ConfigurationError.
    """

    model_config = SettingsConfigDict(
        env_prefix="QUIRE_", extra="forbid", frozen=True, env_ignore_empty=True
    )

    model: str | None = Field(
        None, description="Hugging Face name or folder. Default: the built-in demo model."
    )
    config: Path | None = Field(None, description="YAML file with the same names as the flags.")

    host: str = _option("Server", "Address to listen on.", "127.0.0.1")
    port: int = _option("Server", "Port to listen on; 0 takes any free one.", 8000, ge=0, le=65535)
    uds: str | None = _option("Server", "Listen on this unix socket instead of host and port.")
    http_workers: int = _option(
        "Server",
        "HTTP processes that share the port and the engine, 1 to 64.",
        1,
        ge=1,
        le=64,
    )
    served_model_name: NameList = _option(
        "Server",
        "Name that clients ask for; repeatable, answers carry the first. Default: MODEL.",
        (),
    )
    root_path: str = _option("Server", "Path prefix under which a proxy serves this server.", "")
    allowed_origins: NameList = _option("Server", "Origins allowed by CORS; repeatable.", ())
    ssl_keyfile: Path | None = _option("Server", "TLS private key (PEM).")
    ssl_certfile: Path | None = _option("Server", "TLS certificate chain (PEM).")
    shutdown_timeout: float = _option(
        "Server", "Seconds that running requests may take to finish after SIGTERM.", 30.0, ge=0
    )
    sse_keepalive_interval: float = _option(
        "Server",
        "Seconds of silence after which a stream sends a comment; 0 disables it.",
        15.0,
        ge=0,
    )
    stream_stall_timeout: float = _option(
        "Server",
        "Seconds that a client may read nothing from its stream before the request is aborted.",
        30.0,
        gt=0,
    )
    stream_resume_ttl: float = _option(
        "Server",
        "Seconds that a resumable stream waits for its client; 0 disables resuming.",
        60.0,
        ge=0,
    )

    lora: NameList = _option(
        "Model",
        "LoRA adapter that clients select by name, as NAME=FOLDER; repeatable.",
        (),
        details="`--lora-modules` is another name of the flag.",
    )
    lora_dir: Path | None = _option(
        "Model",
        "Folder below which POST /v1/load_lora_adapter finds adapters; off without it.",
    )
    chat_template: str | None = _option("Model", "Jinja chat template: a file or the text itself.")
    score_template: str | None = _option(
        "Model",
        "Jinja template that joins a query and a document: a file or the text itself.",
        details="It reads messages of the roles query and document. See Rerank, score and "
        "classify.",
    )
    trust_request_chat_template: bool = _option(
        "Model", "Accept a chat_template inside a request.", False
    )
    tool_call_parser: ToolCallParser = _option(
        "Model",
        "Format of tool calls; auto reads it off the chat template.",
        "auto",
        details=f"One of {', '.join(get_args(ToolCallParser))}.",
    )
    reasoning_parser: ReasoningParser = _option(
        "Model",
        "Format of reasoning; auto reads it off the chat template.",
        "auto",
        details=f"One of {', '.join(get_args(ReasoningParser))}.",
    )
    generation_config: str = _option(
        "Model",
        "Defaults of the sampling parameters: auto (the model's), none, or a folder.",
        "auto",
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
        "Scheduling", "Seconds that a request may take in total.", 1200.0, gt=0
    )
    engine_stall_timeout: float = _option(
        "Scheduling",
        "Seconds without a finished step after which the engine is restarted.",
        120.0,
        gt=0,
    )

    data_parallel_size: int = _option(
        "Scheduling",
        "Engines, each with the whole model, among which requests are divided.",
        1,
        ge=1,
        le=64,
        details="Each gets a GPU, or its share of the CPUs. See docs/scaling.md.",
    )

    max_n: int = _option("Limits", "Maximum n and best_of.", 128, ge=1)
    max_prompts_per_request: int = _option("Limits", "Maximum prompts per request.", 256, ge=1)
    max_body_bytes: ByteSize = _option("Limits", "Maximum size of a request body.", "16MiB", gt=0)
    max_stored_responses: int = _option(
        "Limits", "Maximum stored answers of /v1/responses; 0 stores none.", 1024, ge=0
    )
    max_stored_response_bytes: ByteSize = _option(
        "Limits", "Maximum size of all stored responses, as JSON.", "64MiB", gt=0
    )
    stored_response_ttl: float = _option(
        "Limits", "Seconds that a response stays stored.", 3600.0, gt=0
    )
    strict: bool = _option(
        "Limits",
        "Refuse unknown request fields instead of naming them in x-quire-ignored-params.",
        False,
    )

    speculative_config: str | dict[str, Any] | None = _option(
        "Scheduling",
        "The flags of speculation as vLLM writes them: JSON with model, num_speculative_tokens.",
        details="Also method: ngram or draft_model. Other keys are refused.",
    )

    log_level: Literal["debug", "info", "warning", "error"] = _option(
        "Logging and metrics", "Lowest severity to log.", "info"
    )
    log_format: Literal["auto", "console", "json"] = _option(
        "Logging and metrics", "auto is console on a terminal and json elsewhere.", "auto"
    )
    enable_log_requests: bool = _option(
        "Logging and metrics", "Log one line for each request.", False
    )
    metrics_prefix: Literal["quire", "vllm"] = _option(
        "Logging and metrics",
        "Prefix of metric names; vllm fits dashboards made for vLLM.",
        "quire",
    )

    otlp_traces_endpoint: TracesEndpoint | None = _option(
        "Logging and metrics",
        "URL to which traces are sent by OTLP over HTTP; no traces without it.",
        details="Needs the extra `otel`. Without a path, `/v1/traces` is added.",
    )

    @field_validator("served_model_name", "allowed_origins", "lora", mode="before")
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
                f"{value} is not a port. Kubernetes sets QUIRE_PORT to this in the pods of a "
                "namespace with a Service named quire: set enableServiceLinks: false in the pod's "
                "spec, give --port, or give the Service another name"
            )
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin} is not an origin, such as https://chat.example.com, null or *; "
                    "repeat the flag for each"
                )
        return value

    @field_validator("lora")
    @classmethod
    def _check_lora(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        read_sources(value)
        return value

    @field_validator("lora_dir")
    @classmethod
    def _check_lora_dir(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"there is no folder {value}")
        return value

    take_speculative_config = model_validator(mode="before")(take_speculative_config)

    @model_validator(mode="after")
    def _check_combinations(self) -> Settings:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile go together")
        if self.require_api_key and not self.api_key:
            raise ValueError(
                "require_api_key is set, so clients need a key: set QUIRE_API_KEY or give --api-key"
            )
        for adapter in self.adapters:
            if adapter.name in self.served_names:
                raise ValueError(f"lora: {adapter.name!r} is the name of the model itself")
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
        """Return the sources of settings, the strongest first. Raises ConfigurationError."""
        refuse_empty_keys(init_settings())
        path = init_settings().get("config") or env_settings().get("config")
        if path is None:
            return init_settings, env_settings
        from_file = read_file(Path(path))
        return init_settings, env_settings, InitSettingsSource(settings_cls, from_file)

    @property
    def model_path(self) -> str:
        """The name or folder that the engine and the tokenizer load."""
        if self.model is not None:
            return self.model
        return str(files("quire.configs") / "demo")

    @property
    def is_demo(self) -> bool:
        """Whether the built-in demo model is served."""
        return self.model is None

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names accepted as a request's `model`, never empty; answers carry the first."""
        return self.served_model_name or (self.model or DEMO_MODEL_NAME,)

    @property
    def adapters(self) -> tuple[AdapterSource, ...]:
        """The LoRA adapters that are loaded at the start."""
        return read_sources(self.lora)

    def engine_config(self) -> EngineConfig:
        """Return the engine's settings. Raises ConfigurationError."""
        values: dict[str, Any] = {flag.field: getattr(self, flag.name) for flag in engine_flags()}
        for name, value in values.items():
            if isinstance(value, ByteSize):
                values[name] = int(value)
        values["enable_lora"] |= bool(self.lora) or self.lora_dir is not None
        read_kv_events(values["kv_events_config"])
        values["lowers_max_num_seqs"] = "max_num_seqs" not in self.model_fields_set
        return EngineConfig(model=self.model_path, lora=self.adapters, **values)


def load_settings(**flags: Any) -> Settings:
    """Read the settings from `flags`, the environment and the YAML file.

    Raises ConfigurationError, which names every wrong setting in one line.
    """
    return read_settings(flags, as_flags=False)


def read_settings(flags: dict[str, Any], *, as_flags: bool = True) -> Settings:
    """Read the settings as `load_settings` does; with `as_flags`, errors spell them as flags."""
    try:
        return Settings(**flags)
    except ValidationError as error:
        names = list(Settings.model_fields)
        origins = origins_of(flags, names)
        problems = [
            origins.describe(dict(item), names, as_flags=as_flags)
            for item in error.errors(include_url=False)
        ]
        raise ConfigurationError("; ".join(problems)) from error
