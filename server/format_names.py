"""Names of the formats in which models write tool calls and reasoning, for flags."""

from __future__ import annotations

from typing import Literal

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
