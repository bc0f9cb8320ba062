"""Tiny random models of the families whose heads share a latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Mistral4ForCausalLM, PreTrainedModel
from transformers.models.axk1 import AXK1Config
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.glm4_moe_lite import Glm4MoeLiteConfig
from transformers.models.longcat_flash import LongcatFlashConfig
from transformers.models.minicpm3 import MiniCPM3Config
from transformers.models.mistral4 import Mistral4Config
from transformers.models.youtu import YoutuConfig

from .models import COMMON, MAX_POSITION, build_model

_LATENT: dict[str, Any] = COMMON | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
}
_GROUPS: dict[str, Any] = _EXPERTS | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": MAX_POSITION // 4,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "beta_fast": 32,
    "beta_slow": 1,
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "deepseek_v2": lambda: DeepseekV2Config(
        **_LATENT | _EXPERTS | {"n_group": 4, "topk_group": 2},
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
        rope_parameters=_YARN,
    ),
    "deepseek_v2_lite": lambda: DeepseekV2Config(
        **_LATENT | _EXPERTS | {"q_lora_rank": None},
        first_k_dense_replace=1,
        topk_method="greedy",
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **_LATENT | _GROUPS, first_k_dense_replace=1, rope_parameters=_YARN
    ),
    "glm4_moe_lite": lambda: Glm4MoeLiteConfig(**_LATENT | _GROUPS),
    "minicpm3": lambda: MiniCPM3Config(
        **_LATENT, scale_emb=3.0, scale_depth=1.4, dim_model_base=16
    ),
    "youtu": lambda: YoutuConfig(**_LATENT | {"tie_word_embeddings": True}),
    "axk1": lambda: AXK1Config(**_LATENT | _GROUPS, first_k_dense_replace=1),
    "mistral4": lambda: Mistral4Config(
        **_LATENT | _GROUPS,
        rope_parameters=_YARN | {"llama_4_scaling_beta": 0.1},
    ),
    "longcat_flash": lambda: LongcatFlashConfig(
        **_LATENT,
        head_dim=16,
        n_routed_experts=8,
        zero_expert_num=4,
        moe_topk=3,
        expert_ffn_hidden_size=32,
        routed_scaling_factor=1.5,
    ),
}
"""Families that differ in queries, rotations, scales and experts."""


def in_groups() -> YoutuConfig:
    """Return a model whose products have inputs of whole groups of 32."""
    return YoutuConfig(**_LATENT | {"q_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 8})


def build(family: str) -> PreTrainedModel:
    """Return a random float32 model of a family."""
    config = FAMILIES[family]()
    if family != "mistral4":  # which transformers counts among those that also read images
        return build_model(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = Mistral4ForCausalLM._from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()
