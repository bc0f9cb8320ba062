"""The shapes of the models that the GPU benchmarks run, and the computed ceiling of each.

The ceiling is the speed at which memory or compute, whichever is slower, allows the work at the
limits of the device. Needs only the standard library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 2048,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""The `config.json` of each model; "tiny" is for trying the scripts without a GPU."""


class Limits(NamedTuple):
    """The speed of a device: bytes/s of a copy, FLOP/s of a matmul. Defaults: H200, measured."""

    bandwidth: float = 4.3e12
    flops: float = 790e12


def write_config(shape: str, folder: Path) -> None:
    """Write a model folder without weights or tokenizer."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(SHAPES[shape] | ids))


class Cost(NamedTuple):
    """What a model costs: weight bytes read per step (bf16), those of its layers alone, KV bytes
    per token, and attention FLOPs per pair of query and key."""

    weights: float
    body: float
    kv: float
    pair: float


def cost_of(shape: str, kv_bytes_per_element: int = 2) -> Cost:
    """Compute a shape's cost from its configuration."""
    config = SHAPES[shape]
    layers, hidden, head_dim = (
        config[key] for key in ("num_hidden_layers", "hidden_size", "head_dim")
    )
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layer = 2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * config["intermediate_size"]
    body = 2.0 * layers * layer
    return Cost(
        body + 2.0 * config["vocab_size"] * hidden,
        body,
        2.0 * kv_bytes_per_element * layers * kv_heads * head_dim,
        4.0 * layers * heads * head_dim,
    )


def decode_seconds(cost: Cost, batch: float, context: float, limits: Limits) -> float:
    """Return a decode step's minimum time: to read all weights, K and V, or to compute."""
    memory = (cost.weights + batch * context * cost.kv) / limits.bandwidth
    return max(memory, batch * (cost.weights + cost.pair * context) / limits.flops)


def prefill_seconds(cost: Cost, tokens: int, limits: Limits) -> float:
    """Return the minimum time to compute a prompt of this length."""
    return (cost.body * tokens + cost.pair * tokens * tokens / 2) / limits.flops


def offline_seconds(cost: Cost, lengths: list[tuple[int, int]], limits: Limits) -> float:
    """Return the minimum time for (prompt, output) lengths: all prompts, then all outputs.

    Decode step k runs the requests with more than k output tokens, each with its prompt and k
    tokens of context.
    """
    total = sum(prefill_seconds(cost, prompt, limits) for prompt, _ in lengths)
    for step in range(max(output for _, output in lengths)):
        contexts = [prompt + step for prompt, output in lengths if output > step]
        mean = sum(contexts) / len(contexts)
        total += decode_seconds(cost, len(contexts), mean, limits)
    return total
