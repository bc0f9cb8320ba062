"""The kinds of models that the CPU computes in different ways, with tiny random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers.models.mixtral import MixtralConfig
from transformers.models.qwen3 import Qwen3Config

from .. import latent_models, state_models
from ..lora_models import save_adapter
from ..models import COMMON, GEMMA4, build_model, gemma4, llama4, save_model
from .crowd import Body

WIDER = {
    "hidden_size": 320, "intermediate_size": 192, "num_attention_heads": 10,
    "num_key_value_heads": 5, "initializer_range": 0.1,
}  # fmt: skip
"""Sizes at which matrix libraries use several kernels."""


def _save(config: Callable[[], Any], folder: Path) -> None:
    build_model(config()).save_pretrained(folder)


def _family(name: str) -> Callable[[Path], object]:
    return partial(save_model, name)


def _with_states(family: str) -> Callable[[Path], object]:
    return partial(_save, state_models.FAMILIES[family])


def _with_latents(family: str) -> Callable[[Path], object]:
    return lambda folder: latent_models.build(family).save_pretrained(folder)


def _with_adapters(family: str, folder: Path) -> None:
    base = save_model(family, folder)
    for number, name in enumerate("ab"):
        layers = ["q_proj", "v_proj", "o_proj"]
        save_adapter(base, folder / name, seed=number, r=4, target_modules=layers)


def _body(name: str, save: Callable[[Path], object], **fields: Any) -> Body:
    return Body(name, save, fields)


COMPILED = (
    _body("llama", _family("llama")),
    _body("qwen2", _family("qwen2")),
    _body("mistral, sliding window", _family("mistral")),
    _body("qwen3, two threads", _family("qwen3"), num_threads=2),
    _body("phi3", _family("phi3")),
    _body("qwen3, float16 cache", _family("qwen3"), kv_cache_dtype="float16"),
    _body("qwen3, int8 cache", _family("qwen3"), kv_cache_dtype="int8"),
    _body("qwen3, bfloat16", _family("qwen3"), dtype="bfloat16"),
    _body("qwen3, float16", _family("qwen3"), dtype="float16"),
    _body("qwen3, int8", _family("qwen3"), quantization="int8"),
    _body("qwen3, int4", _family("qwen3"), quantization="int4"),
    _body("wide", partial(_save, lambda: Qwen3Config(**COMMON | WIDER, head_dim=32))),
)
"""Models whose layers run as one compiled function."""

GENERIC = (
    _body("gemma2", _family("gemma2")),
    _body("gemma3", _family("gemma3")),
    _body("mixtral", _family("mixtral")),
    _body("gpt_oss", _family("gpt_oss")),
    _body("llama4", partial(_save, llama4)),
    _body("gemma4", partial(_save, partial(gemma4, **GEMMA4["shared"]))),
    _body("qwen3_5, states", _with_states("qwen3_5")),
    _body("granite_4_h, states", _with_states("granite_4_h")),
    _body("lfm2, states", _with_states("lfm2")),
    _body("youtu, latents", _with_latents("youtu")),
    _body("deepseek_v3, latents", _with_latents("deepseek_v3")),
    _body("qwen3_moe, bfloat16", _family("qwen3_moe"), dtype="bfloat16"),
    _body("qwen3_moe, float16 cache", _family("qwen3_moe"), kv_cache_dtype="float16"),
    _body("qwen3_moe, int8", _family("qwen3_moe"), quantization="int8"),
    _body(
        "wide experts",
        partial(
            _save,
            lambda: MixtralConfig(
                **COMMON | WIDER, head_dim=32, num_local_experts=8, num_experts_per_tok=2
            ),
        ),
    ),
)
"""Models that run as transformers' code, or with mixtures of it; their tokens are computed one at a
time."""


ADAPTED = tuple(
    Body(f"{family}, LoRA", partial(_with_adapters, family), {}, adapters=("a", "b"))
    for family in ("llama", "qwen3_moe")
)
"""Models with two LoRA adapters: compiled, and beside transformers' own layers."""
