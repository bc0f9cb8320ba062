"""Types of settings: names of the formats of tool calls and reasoning, keys, the log, and vLLM's
way to write the flags of speculation.

An empty key is a mistake, such as a variable that a script could not fill in, and never means that
no key is wanted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.config import JsonDict
from pydantic_settings import BaseSettings, NoDecode

from ..engine.errors import ConfigurationError

ToolCallParser = Literal[
    "auto",
    "none",
    "generic",
    "response_template",
    "hermes",
    "granite4",
    "smollm3",
    "llama3_json",
    "llama4_json",
    "pythonic",
    "llama4_pythonic",
    "gemma3",
    "olmo3",
    "lfm2",
    "mistral",
    "deepseek_v3",
    "deepseek_v31",
    "qwen3_coder",
    "qwen3_xml",
    "mimo",
    "seed_oss",
    "glm45",
    "glm47",
    "kimi_k2",
    "minimax",
    "jamba",
    "minimax_m2",
    "gemma4",
    "functiongemma",
    "granite",
    "phi4_mini_json",
    "nemotron_json",
    "llama_nemotron_json",
    "cohere_command3",
    "command_r",
    "openai",
    "harmony",
]
"""Formats of tool calls (server/parsing/formats), with their aliases. The names are vLLM's, as far
as it has the format."""
ReasoningParser = Literal[
    "auto",
    "none",
    "qwen3",
    "deepseek_r1",
    "mistral",
    "seed_oss",
    "cohere_command3",
    "gemma4",
    "openai_gptoss",
    "harmony",
]
"""Formats of reasoning. `harmony` is another name for vLLM's `openai_gptoss`."""


def option(
    group: str, help: str, default: Any = None, *, details: str = "", **constraints: Any
) -> Any:
    """Declare a field that is a flag listed under `group`.

    docs/api.md shows `details` after the help.
    """
    extra: JsonDict = {"group": group, "details": details}
    return Field(default, description=help, json_schema_extra=extra, **constraints)


SECRETS = ("api_key", "admin_api_key")
"""Settings whose values are never shown."""
_PREFIX = "quire_"


def check_key(key: str) -> str:
    """Return the key. Raises ValueError if it would let anyone in, or if no client can send it."""
    if not key.strip():
        raise ValueError("the key is empty; leave the setting out if no key is wanted")
    if key != key.strip():
        raise ValueError("the key begins or ends with white space, which no header carries")
    return key


def _split(value: Any) -> Any:
    """Split keys at commas, and keep empty ones, which are refused later."""
    return tuple(value.split(",")) if isinstance(value, str) else value


Secret = Annotated[str, AfterValidator(check_key)]
"""A key."""
SecretList = Annotated[tuple[Secret, ...], NoDecode, BeforeValidator(_split)]
"""Keys that are a repeatable flag, comma-separated in the environment and a list in YAML."""


def _check_traces_endpoint(value: str) -> str:
    """Return the URL with its path. Raises ValueError if traces cannot be sent there."""
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(
            f"{value} is not a URL of OTLP over HTTP, such as http://collector:4318/v1/traces "
            "(gRPC, which collectors serve on port 4317, is not spoken)"
        )
    if url.username or url.password:
        raise ValueError("give credentials as OTEL_EXPORTER_OTLP_HEADERS in the environment")
    return value.rstrip("/") + "/v1/traces" if url.path in ("", "/") else value


TracesEndpoint = Annotated[str, AfterValidator(_check_traces_endpoint)]
"""The URL to which traces are sent."""


def refuse_empty_keys(flags: dict[str, Any]) -> None:
    """Raise ConfigurationError if a variable of the environment holds an empty key and no flag in
    `flags` takes its place. (Empty variables leave all other settings at their defaults.)"""
    for variable, value in os.environ.items():
        name = variable.lower().removeprefix(_PREFIX)
        if variable.lower() != _PREFIX + name or name not in SECRETS or name in flags:
            continue
        try:
            check_key(value)
        except ValueError as error:
            raise ConfigurationError(f"{name}: {error} ({variable})") from error


def take_speculative_config(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    """Fill in quire's own settings for a `speculative_config` among the values of Settings. Raises
    ValueError, as `read_speculative_config` does, or if another value is given beside it."""
    config = data.get("speculative_config")
    for name, value in ({} if config is None else read_speculative_config(config)).items():
        if str(data.setdefault(name, value)) != str(value):
            raise ValueError(f"speculative_config: {name} is {data[name]} beside it")
    return data


def read_speculative_config(value: Any) -> dict[str, Any]:
    """Return quire's own settings for vLLM's `--speculative-config`, a JSON object or its text.

    Raises ValueError, naming the key, on whatever has no counterpart."""
    try:
        config = json.loads(value) if isinstance(value, str) else dict(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"speculative_config: not a JSON object ({error})") from error
    if not isinstance(config, dict):
        raise ValueError("speculative_config: not a JSON object")
    found: dict[str, Any] = {}
    model, method = config.pop("model", None), config.pop("method", None)
    if method == "ngram" or model in ("ngram", "[ngram]"):
        found["speculation"] = "ngram"
    elif method not in (None, "draft_model"):
        raise ValueError(f"speculative_config.method: {method!r} is not ngram or draft_model")
    elif isinstance(model, str):
        found |= {"speculation": "model", "speculative_model": model}
    else:
        raise ValueError("speculative_config.model: the draft model is missing")
    if "num_speculative_tokens" in config:
        found["num_speculative_tokens"] = config.pop("num_speculative_tokens")
    if config.pop("draft_tensor_parallel_size", 1) != 1:
        raise ValueError("speculative_config.draft_tensor_parallel_size: only 1 is supported")
    if config:
        raise ValueError(f"speculative_config.{next(iter(config))}: not supported")
    return found


class KeySettings(BaseSettings):
    """The settings of keys, and of what each may use."""

    api_key: SecretList = option(
        "Server", "Key that clients must send as a Bearer token; repeatable.", ()
    )
    admin_api_key: Secret | None = option(
        "Server", "Key of the admin endpoints, which are off without it."
    )
    require_api_key: bool = option("Server", "Refuse to start without a key for clients.", False)
    api_keys_file: Path | None = option(
        "Server",
        "YAML file of named keys with limits of their own; read again when it changes.",
        details="See Keys.",
    )
    limit_requests_per_minute: int | None = option(
        "Limits", "Requests a minute of each key, beyond which it gets 429.", ge=1
    )
    limit_tokens_per_minute: int | None = option(
        "Limits", "Prompt and output tokens a minute of each key, beyond which it gets 429.", ge=1
    )
    limit_concurrent_requests: int | None = option(
        "Limits", "Requests of each key that may run at once; further ones get 429.", ge=1
    )
    prefix_cache_isolation: Literal["key", "none"] | None = option(
        "Limits",
        "key: prompts of one key are not found in the prefix cache by another. Default: key if "
        "there are several keys.",
    )


class LogSettings(BaseSettings):
    """The settings of the log, of metrics and of traces."""

    log_level: Literal["debug", "info", "warning", "error"] = option(
        "Logging and metrics", "Lowest severity to log.", "info"
    )
    log_format: Literal["auto", "console", "json"] = option(
        "Logging and metrics", "auto is console on a terminal and json elsewhere.", "auto"
    )
    enable_log_requests: bool = option(
        "Logging and metrics", "Log one line for each request.", False
    )
    metrics_prefix: Literal["quire", "vllm"] = option(
        "Logging and metrics",
        "Prefix of metric names; vllm fits dashboards made for vLLM.",
        "quire",
    )
    otlp_traces_endpoint: TracesEndpoint | None = option(
        "Logging and metrics",
        "URL to which traces are sent by OTLP over HTTP; no traces without it.",
        details="Needs the extra `otel`. Without a path, `/v1/traces` is added.",
    )
