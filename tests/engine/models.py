"""Tiny random models of the supported families, saved as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.cohere import CohereConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gemma4 import Gemma4TextConfig
from transformers.models.glm4 import Glm4Config
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.granite import GraniteConfig
from transformers.models.llama import LlamaConfig
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.mistral import MistralConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.olmo2 import Olmo2Config
from transformers.models.olmo3 import Olmo3Config
from transformers.models.olmoe import OlmoeConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.smollm3 import SmolLM3Config

VOCAB_SIZE = 128
MAX_POSITION = 256
WINDOW = 24

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITION,
    "initializer_range": 0.3,  # far from uniform logits, so that an argmax is never a tie
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **COMMON,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON | {"num_hidden_layers": 3},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=8.0,
    ),
    "phi3": lambda: Phi3Config(
        **COMMON | {"num_attention_heads": 2},
        rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
    ),
    "granite": lambda: GraniteConfig(
        **COMMON,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    "smollm3": lambda: SmolLM3Config(**COMMON, no_rope_layers=[1, 0]),
    "olmo2": lambda: Olmo2Config(**COMMON),
    "olmo3": lambda: Olmo3Config(
        **COMMON,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": MAX_POSITION // 2,
            },
        },
    ),
    "glm4": lambda: Glm4Config(**COMMON, head_dim=16),
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **COMMON, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
    "olmoe": lambda: OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: GptOssConfig(
        **COMMON,
        head_dim=16,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
"""Families that differ in tied weights, norms, rotations, windows, soft caps, experts and sinks."""

CHUNK = 32


def llama4(**fields: Any) -> Llama4TextConfig:
    """Return six layers that attend in chunks, but for each third one, which is full, without
    rotation, and grows its queries every 16 tokens; every second one has experts."""
    values: dict[str, Any] = COMMON | {
        "num_hidden_layers": 6,
        "head_dim": 16,
        "intermediate_size": 32,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 3,
        "attention_chunk_size": CHUNK,
        "floor_scale": 16,
        "attn_scale": 0.4,
    }
    return Llama4TextConfig(**values | fields)


WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of 16 elements, the least that the GPU's kernels take."""


def not_flat() -> CohereConfig:
    """Return a model whose norms are of another kind: on every device it runs as transformers'
    code."""
    return CohereConfig(**COMMON | WIDE_HEADS)


def gemma4(**fields: Any) -> Gemma4TextConfig:
    """Return six layers, the third and the last with twice as wide heads and no window; `fields`
    override."""
    types = [*["sliding_attention"] * 2, "full_attention"] * 2
    fields = {"head_dim": 16, "global_head_dim": 32, "layer_types": types} | fields
    fields = COMMON | {"num_hidden_layers": len(fields["layer_types"])} | fields
    return Gemma4TextConfig(
        **fields, sliding_window=WINDOW, vocab_size_per_layer_input=fields["vocab_size"]
    )


GEMMA4: dict[str, dict[str, Any]] = {
    # As 26B and 31B: K is V but for its norm and rotation; windowed layers have two lines each.
    "experts": {
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    # As E4B: full layers have two lines each, and the last three layers those of others.
    "shared": {
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 8,
        "use_double_wide_mlp": True,
    },
    # As E2B, whose only head cannot be cut: the narrow ones are filled up.
    "one head": {
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 8,
    },
}
"""Fields of `gemma4` for the three ways in which its layers share block tables."""


def build_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """Return a random float32 model; only eager attention, which it uses, supports soft caps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
    with torch.no_grad():  # biases, norms and sinks start as constants that would hide mistakes
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save_model(family: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Build the family's model, save it in `folder` and return it as the reference."""
    model = build_model(FAMILIES[family](), seed)
    model.save_pretrained(folder)
    return model


def generate(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Return the reference's greedy continuation, ignoring end-of-sequence."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            suppress_tokens=None,
            eos_token_id=None,
        )
    return output[0, len(prompt) :].tolist()


def logprobs(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Return the reference's log-probabilities `[len(token_ids), vocab]` after each token."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)
