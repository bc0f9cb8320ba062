"""Types of settings: names of the formats of tool calls and reasoning, keys.

An empty key is a mistake, such as a variable that a script could not fill in, and never means that
no key is wanted.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.config import JsonDict
from pydantic_settings import NoDecode

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


_SECRETS = ("api_key", "admin_api_key")
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


def refuse_empty_keys(flags: dict[str, Any]) -> None:
    """Raise ConfigurationError if a variable of the environment holds an empty key and no flag in
    `flags` takes its place. (Empty variables leave all other settings at their defaults.)"""
    for variable, value in os.environ.items():
        name = variable.lower().removeprefix(_PREFIX)
        if variable.lower() != _PREFIX + name or name not in _SECRETS or name in flags:
            continue
        try:
            check_key(value)
        except ValueError as error:
            raise ConfigurationError(f"{name}: {error} ({variable})") from error
