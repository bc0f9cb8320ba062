"""The table of docs/models.md, made from the models that the tests prove.

`make docs` writes it: with QUIRE_WRITE_DOCS in the environment the test below writes instead of
comparing.
"""

from __future__ import annotations

import os

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from .documents import ROOT
from .engine import latent_models, models, state_models
from .engine.body.test_flat_decoder import FLAT, FLAT_ON_GPUS

PAGE = ROOT / "docs/models.md"
BEGIN, END = "<!-- models: written by `make docs` -->\n", "<!-- end of models -->"
FAMILIES = models.FAMILIES | {"llama4": models.llama4} | state_models.FAMILIES
FAMILIES |= latent_models.FAMILIES
CHECKPOINTS = {
    "llama": "Llama 2 and 3, SmolLM2, TinyLlama",
    "qwen2": "Qwen2.5, DeepSeek-R1-Distill-Qwen",
    "qwen3": "Qwen3, dense",
    "mistral": "Mistral 7B",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "phi3": "Phi-3, Phi-4-mini",
    "granite": "Granite 3 and 4, dense",
    "smollm3": "SmolLM3",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "glm4": "GLM-4-0414",
    "mixtral": "Mixtral 8x7B",
    "qwen3_moe": "Qwen3-30B-A3B",
    "olmoe": "OLMoE",
    "gpt_oss": "gpt-oss",
    "llama4": "Llama 4 Scout and Maverick",
    "qwen3_5": "Qwen3.5 and 3.6, dense",
    "qwen3_5_moe": "Qwen3.5 and 3.6, A3B",
    "qwen3_next": "Qwen3-Next, Qwen3-Coder-Next",
    "olmo_hybrid": "OLMo-Hybrid",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2-8B-A1B",
    "granite_4_h": "Granite 4 H",
    "bamba": "Bamba",
    "falcon_h1": "Falcon-H1",
    "nemotron_h": "Nemotron-H, Nemotron 3",
    "deepseek_v2": "DeepSeek V2",
    "deepseek_v2_lite": "DeepSeek V2 Lite",
    "deepseek_v3": "DeepSeek V3, R1 and V3.1",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "minicpm3": "MiniCPM3",
    "youtu": "Youtu-LLM",
    "axk1": "A.X K1",
    "mistral4": "Mistral Small 4",
    "longcat_flash": "LongCat-Flash",
}
"""Names by which people know the families."""
TRAITS = {
    "sliding_window": "windows",
    "attention_chunk_size": "chunks",
    "num_local_experts": "experts",
    "num_experts": "experts",
    "attn_logit_softcapping": "soft caps",
    "kv_lora_rank": "latents",
    "linear_num_value_heads": "states",
    "conv_L_cache": "states",
    "mamba_n_heads": "states",
    "mamba_num_heads": "states",
}
"""Fields of a configuration, and what they are."""


def _row(family: str) -> str:
    config = FAMILIES[family]()
    mappings = [auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForImageTextToText)]
    kind = next(each[type(config)].__name__ for each in mappings if type(config) in each)
    windowed = getattr(config, "use_sliding_window", True)
    traits = {
        name
        for field, name in TRAITS.items()
        if getattr(config, field, None) and (windowed or name != "windows")
    }
    compiled = "yes" if family in FLAT else "on GPUs" if family in FLAT_ON_GPUS else "no"
    return f"| {CHECKPOINTS[family]} | `{kind}` | {', '.join(sorted(traits))} | {compiled} |"


def table() -> str:
    lines = ["| for example | architecture | has | compiled |", "|---|---|---|---|"]
    return "\n".join([*lines, *map(_row, FAMILIES)]) + "\n"


def test_the_table_of_models_is_up_to_date() -> None:
    assert CHECKPOINTS.keys() == FAMILIES.keys() >= FLAT
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end
    page = f"{before}{BEGIN}{table()}{END}{after}"
    if os.environ.get("QUIRE_WRITE_DOCS"):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page, "run `make docs`"
