"""Test that checkpoints with encoders of images are served for text, as transformers does it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.falcon import FalconConfig
from transformers.models.git import GitConfig
from transformers.models.gptj import GPTJConfig
from transformers.models.granitemoehybrid import GraniteMoeHybridConfig
from transformers.models.opt import OPTConfig

from quire.engine.errors import UnsupportedModelError

from ..models import COMMON, WINDOW, generate
from ..worker_driver import Driver, load, make_config, make_sequence

PROMPTS = [[5, 80, 17, 33, 64, 9, 110, 7], [3, 4]]
HEADS = COMMON | {"head_dim": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SIGLIP = VISION | {"model_type": "siglip_vision_model"}

CONFIGS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl": (
        True,
        HEADS | {"rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}},
        QWEN_VISION
        | {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    "qwen2_5_vl": (
        True,
        COMMON | {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
        QWEN_VISION | {"out_hidden_size": 32},
    ),
    "mistral3": (True, HEADS | {"model_type": "mistral"}, VISION | {"model_type": "pixtral"}),
    "internvl": (
        True,
        COMMON | {"model_type": "qwen2"},
        VISION | {"image_size": [32, 32], "patch_size": [16, 16], "model_type": "internvl_vision"},
    ),
    "smolvlm": (True, HEADS | {"model_type": "llama"}, VISION | {"model_type": "smolvlm_vision"}),
    "llava_onevision": (True, COMMON | {"model_type": "qwen2"}, SIGLIP),
    "gemma3": (False, HEADS | {"query_pre_attn_scalar": 16, "sliding_window": WINDOW}, SIGLIP),
}
"""For each family whether its layers run as one function, and its text and vision configuration."""


def save(family: str, folder: Path) -> Any:
    """Save a random model and return it."""
    _, text, vision = CONFIGS[family]
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_text_is_that_of_transformers_and_encoders_are_dropped(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = save(family, tmp_path)
    with caplog.at_level(logging.INFO):
        driver = Driver.start(make_config(tmp_path, dtype="float32"))
    is_flat, _, _ = CONFIGS[family]
    assert ("the layers run as one function" in caplog.text) is is_flat
    assert "is not used for text" in caplog.text
    text = sum(parameter.numel() for parameter in reference.get_decoder().parameters())
    head = reference.get_output_embeddings().weight
    tied = head is reference.get_input_embeddings().weight
    weights = driver.worker._model.weights
    assert weights.num_parameters == text + (0 if tied else head.numel())
    assert weights.num_bytes == 4 * weights.num_parameters
    assert reference.num_parameters() > weights.num_parameters
    outputs = driver.run([make_sequence(prompt, 12) for prompt in PROMPTS])
    assert outputs == [generate(reference, prompt, 12) for prompt in PROMPTS]


def test_random_weights_have_no_encoders_either(tmp_path: Path) -> None:
    save("mistral3", tmp_path)
    facts = load(tmp_path, load_format="dummy").weights
    assert facts == load(tmp_path).weights._replace(source_format="random weights")


def granite(layer_types: list[str]) -> GraniteMoeHybridConfig:
    return GraniteMoeHybridConfig(
        **COMMON,
        layer_types=layer_types,
        num_local_experts=0,
        shared_intermediate_size=64,
        position_embedding_type="rope",
        mamba_n_heads=4,
        mamba_d_head=16,
    )


def test_a_hybrid_family_without_recurrent_layers_is_served(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference = AutoModelForCausalLM.from_config(
            granite(["attention"] * 2), attn_implementation="eager"
        ).eval()
    reference.save_pretrained(tmp_path)
    driver = Driver.start(make_config(tmp_path, dtype="float32"))
    outputs = driver.run([make_sequence(prompt, 12) for prompt in PROMPTS])
    assert outputs == [generate(reference, prompt, 12) for prompt in PROMPTS]


TINY = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
OLD = TINY | {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FalconConfig(**OLD), "does not go through transformers' AttentionInterface"),
        (
            GPTJConfig(**TINY, n_embd=32, n_layer=1, n_head=4, rotary_dim=4),
            "does not go through transformers' AttentionInterface",
        ),
        (GitConfig(**OLD, intermediate_size=32), "AttentionInterface"),
        (OPTConfig(**OLD, ffn_dim=32, word_embed_proj_dim=32), "apart from its body"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_families_that_cannot_be_served_are_refused_with_the_reason(
    tmp_path: Path, config: Any, reason: str
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        load(tmp_path, load_format="dummy")
    assert "quire_paged" not in caught.value.message
