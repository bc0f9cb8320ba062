"""Tiny GGUF files, written with the package gguf from random models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from transformers import PreTrainedModel
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from ..models import COMMON, build_model

WIDE: dict[str, Any] = COMMON | {"hidden_size": 256, "intermediate_size": 256}
"""A size that blocks of 256 fit."""
CONFIGS: dict[str, tuple[str, Any]] = {
    "llama": ("llama", lambda: LlamaConfig(**WIDE)),
    "llama-tied": ("llama", lambda: LlamaConfig(**WIDE, tie_word_embeddings=True)),
    "llama-bias": ("llama", lambda: LlamaConfig(**WIDE, attention_bias=True)),
    "qwen2": ("qwen2", lambda: Qwen2Config(**WIDE)),
    # transformers reads neither the head size of this family nor the size of its experts.
    "qwen3": ("qwen3", lambda: Qwen3Config(**WIDE, head_dim=128, tie_word_embeddings=True)),
    "gemma2": (
        "gemma2",
        lambda: Gemma2Config(**WIDE, head_dim=64, query_pre_attn_scalar=256, sliding_window=24),
    ),
    "gemma3": (
        "gemma3",
        lambda: Gemma3TextConfig(
            **WIDE, head_dim=64, query_pre_attn_scalar=256, sliding_window=512
        ),
    ),
    "phi3": ("phi3", lambda: Phi3Config(**WIDE)),
    "qwen3moe": (
        "qwen3moe",
        lambda: Qwen3MoeConfig(
            **WIDE,
            head_dim=64,
            moe_intermediate_size=768,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
    ),
}
"""Families by llama.cpp's names, and their configurations."""

_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Positions of the float16 numbers in blocks that the package cannot quantise."""


def random_blocks(kind: Type, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Return random blocks of a K type, `[…, bytes]`, with scales that leave weights small."""
    generator = np.random.default_rng(seed)
    elements, size = GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // elements, size), dtype=np.uint8)
    for position in _SCALES[kind.name]:
        scales = generator.uniform(2e-5, 1e-4, (*blocks.shape[:-1], 1)).astype(np.float16)
        blocks[..., position : position + 2] = scales.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def encode(weight: torch.Tensor, kind: Type) -> np.ndarray[Any, Any]:
    """Return a weight as the bytes of a type; of a K type, random ones of its shape."""
    values = weight.float().numpy()
    if kind.name in _SCALES:
        return random_blocks(kind, values.shape, values.shape[0])
    encoded: np.ndarray[Any, Any] = quantize(values, kind)
    return encoded


def write_model(
    path: Path,
    family: str,
    kind: str = "F32",
    rope_freqs: torch.Tensor | None = None,
    **metadata: Any,
) -> PreTrainedModel:
    """Write a random model with matrices of a type, and return it as it was before.

    `metadata` replaces numbers of the architecture.
    """
    name, make_config = CONFIGS[family]
    model = build_model(make_config())
    config: Any = model.config
    writer = gguf.GGUFWriter(path, name)
    numbers: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None) or 64,
        "attention.value_length": getattr(config, "head_dim", None) or 64,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters.get("rope_theta", 1e6),
    }
    if name == "llama":
        numbers["rope.dimension_count"] = 64
    if name == "qwen3moe":
        numbers |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if name.startswith("gemma"):
        numbers["attention.sliding_window"] = config.sliding_window
    for key, value in (numbers | metadata).items():
        full_key = f"{name}.{key}"
        if isinstance(value, str):
            writer.add_string(full_key, value)
        elif isinstance(value, float):
            writer.add_float32(full_key, value)
        else:
            writer.add_uint32(full_key, value)
    write_tokenizer(writer, config.vocab_size)
    write_tensors(writer, model, name, Type[kind])
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Write a byte-level vocabulary of some ASCII characters, a merge and two control tokens."""
    tokens = ["<pad>", "<s>", "<|end|>", "he"]
    tokens += [chr(code) for code in range(0x21, 0x7F)] + ["Ġ", "Ċ"]
    tokens += [f"unused{i}" for i in range(vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (vocab_size - 3))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}")


def write_tensors(writer: gguf.GGUFWriter, model: Any, name: str, kind: Type) -> None:
    """Write a model's parameters under llama.cpp's names: norms and biases in float32."""
    [arch] = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for full_name, parameter in model.named_parameters():
        weight = parameter.detach()
        parts = {full_name: weight}
        if full_name.endswith("experts.gate_up_proj"):
            stem = full_name.removesuffix("gate_up_proj")
            gate, up = weight.chunk(2, dim=1)
            parts = {f"{stem}gate_proj": gate, f"{stem}up_proj": up}
        for part_name, part in parts.items():
            base, dot, suffix = part_name.rpartition(".")
            if suffix not in ("weight", "bias"):
                base, dot, suffix = part_name, ".", "weight"
            tensor = f"{names.get_name(base)}{dot}{suffix}"
            if name == "llama" and (".attn_q." in tensor or ".attn_k." in tensor):
                is_query = ".attn_q." in tensor
                config = model.config
                heads = config.num_attention_heads if is_query else config.num_key_value_heads
                halves = part.reshape(heads, 2, part.shape[0] // heads // 2, -1)
                part = halves.swapaxes(1, 2).reshape(part.shape)
            if name.startswith("gemma") and "norm" in tensor:
                part = part + 1
            if part.ndim == 1 or "norm" in tensor:
                writer.add_tensor(tensor, part.float().numpy())
            else:
                writer.add_tensor(tensor, encode(part.contiguous(), kind), raw_dtype=kind)
