"""Tiny random models of the families whose layers keep a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.models.bamba import BambaConfig
from transformers.models.falcon_h1 import FalconH1Config
from transformers.models.granitemoehybrid import GraniteMoeHybridConfig
from transformers.models.lfm2 import Lfm2Config
from transformers.models.lfm2_moe import Lfm2MoeConfig
from transformers.models.nemotron_h import NemotronHConfig
from transformers.models.olmo_hybrid import OlmoHybridConfig
from transformers.models.qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_next import Qwen3NextConfig

from .models import COMMON

_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
_QWEN: dict[str, Any] = COMMON | _DELTA | {"head_dim": 16}
_ROPE: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 12,
    "mamba_n_groups": 2,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_MIXED = ["linear_attention", "full_attention", "linear_attention"]

FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3_5": lambda: Qwen3_5TextConfig(**_QWEN, rope_parameters=_ROPE),
    "qwen3_5_moe": lambda: Qwen3_5MoeTextConfig(**_QWEN | _EXPERTS, rope_parameters=_ROPE),
    "qwen3_next": lambda: Qwen3NextConfig(**_QWEN | _EXPERTS),
    "olmo_hybrid": lambda: OlmoHybridConfig(**COMMON | _DELTA),
    "lfm2": lambda: Lfm2Config(
        **COMMON | {"num_hidden_layers": 3},
        layer_types=["conv", "full_attention", "conv"],
        conv_L_cache=3,
        block_auto_adjust_ff_dim=False,
    ),
    "lfm2_moe": lambda: Lfm2MoeConfig(
        **COMMON | {"num_hidden_layers": 3},
        layer_types=["conv", "full_attention", "conv"],
        conv_L_cache=3,
        num_dense_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "granite_4_h": lambda: GraniteMoeHybridConfig(
        **COMMON | _MAMBA | {"num_hidden_layers": 3},
        layer_types=_MIXED,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
        position_embedding_type=None,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    "bamba": lambda: BambaConfig(
        **COMMON | _MAMBA | {"num_hidden_layers": 3}, attn_layer_indices=[1]
    ),
    "falcon_h1": lambda: FalconH1Config(**COMMON | _MAMBA, mamba_d_ssm=64, head_dim=8),
    "nemotron_h": lambda: NemotronHConfig(
        **COMMON,
        layers_block_type=["linear_attention", "full_attention", "moe", "linear_attention", "mlp"],
        head_dim=16,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=12,
        n_groups=2,
        conv_kernel=4,
        chunk_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        n_group=1,
        topk_group=1,
    ),
}
"""Families with linear attention, short convolutions and Mamba-2, with experts and without."""
