"""A transformers configuration from the metadata of a GGUF file, for the most common families.

Others go through transformers' own translation. These are done here because the metadata says more
than that reads (the size of heads, the scaling of rotary positions), and because this needs no
torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..errors import UnsupportedModelError
from .gguf_header import Header

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by whose elements the rotary frequencies are divided (Llama 3.1 and later)."""


class Family(NamedTuple):
    """A llama.cpp family as transformers knows it.

    `permuted` says that rows of Q and K are stored in llama.cpp's order of rotary pairs, and
    `norm_offset` is what stored norms have more than transformers' own. Without a `model_type`,
    transformers translates the metadata.
    """

    model_type: str | None = None
    class_name: str = ""
    permuted: bool = False
    norm_offset: float = 0.0


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma2": Family(norm_offset=1.0),
    "gemma3": Family(norm_offset=1.0),
}
"""The families whose tensors keep their blocks, by llama.cpp's names."""

_SIZES = (
    *("feed_forward_length", "expert_feed_forward_length", "expert_shared_feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "expert_count", "expert_used_count", "rope.dimension_count"),
)
"""Metadata of any family that sizes a model's parts, none of which is over _MAX_SIZE."""
_MAX_SIZE = 2**20

_SCALED_BY_TRANSFORMERS = frozenset({"gpt-oss"})
"""Families whose rotary scaling transformers reads."""

_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Metadata of the tokenizer that names tokens which end a message."""


def config_values(header: Header) -> dict[str, Any] | None:
    """Return the values of the transformers configuration, or None if transformers is to translate
    the metadata. Raises ModelLoadError, UnsupportedModelError."""
    from gguf import MODEL_ARCH_NAMES

    if header.architecture not in MODEL_ARCH_NAMES.values():
        raise UnsupportedModelError(
            f"GGUF of the family {ascii(header.architecture)[:40]} is not known"
        )
    check_sizes(header)
    family = FAMILIES.get(header.architecture)
    if family is None or family.model_type is None:
        return None
    _refuse_unsupported(header)
    heads = header.number("attention.head_count")
    hidden = header.number("embedding_length")
    if heads == 0 or hidden == 0:
        header.refuse("it has no attention heads or no hidden size")
    embedding = header.tensors["token_embd.weight"]  # `check_sizes` has seen it
    values: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.class_name],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": header.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.number("attention.head_count_kv", heads),
        "head_dim": _head_dim(header, hidden // heads),
        "max_position_embeddings": header.number("context_length"),
        "rms_norm_eps": header.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": "float32",
        **_token_ids(header),
    }
    return values | _sizes(header, values)


def _sizes(header: Header, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that a family has of its own, after its sizes were compared with tensors of
    the first layer. `values` are those that all families have."""
    hidden = values["hidden_size"]
    for name, heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
        _expect(header, f"blk.0.{name}.weight", (values["head_dim"] * values[heads], hidden))
    if values["model_type"] == "qwen3_moe":
        experts = header.number("expert_count")
        size = header.number("expert_feed_forward_length")
        _expect(header, "blk.0.ffn_down_exps.weight", (experts, hidden, size))
        return {
            "intermediate_size": header.number("feed_forward_length", 0),
            "moe_intermediate_size": size,
            "num_experts": experts,
            "num_experts_per_tok": header.number("expert_used_count"),
            "norm_topk_prob": True,  # as llama.cpp computes this family
        }
    size = header.number("feed_forward_length")
    _expect(header, "blk.0.ffn_down.weight", (hidden, size))
    if values["model_type"] != "llama":
        return {"intermediate_size": size}
    return {
        "intermediate_size": size,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    }


def complete_config(header: Header, hf_config: Any) -> None:
    """Write into a configuration that transformers has translated what it leaves out of a file.

    Raises UnsupportedModelError if that is something else than the linear scaling of the layers of
    Gemma 3 that attend to all tokens.
    """
    name = header.architecture
    factors = sorted(tensor for tensor in header.tensors if tensor.startswith("rope_"))
    if factors:
        raise UnsupportedModelError(
            f"GGUF of the family {name}: rotary factors ({factors[0]}) are not supported"
        )
    kind = header.metadata.get(f"{name}.rope.scaling.type", "none")
    factor = header.real("rope.scaling.factor", 1.0)
    if kind == "none" or factor == 1.0 or name in _SCALED_BY_TRANSFORMERS:
        return
    if name != "gemma3" or kind != "linear":
        raise UnsupportedModelError(
            f"GGUF of the family {name}: rotary scaling {ascii(kind)[:40]} is not supported"
        )
    hf_config.rope_parameters["full_attention"] |= {"rope_type": "linear", "factor": factor}


def check_sizes(header: Header) -> None:
    """Raise ModelLoadError if the metadata states sizes that the tensors do not bear out, so that
    no model is built that would be larger than the file."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        header.refuse("the tensor token_embd.weight is missing")
    layers = header.number("block_count")
    if layers == 0:
        header.refuse("it has no layers")
    if not any(name.startswith(f"blk.{layers - 1}.") for name in header.tensors):
        header.refuse(f"it states {layers} layers, but tensors of the last one are missing")
    _expect(header, "token_embd.weight", (embedding.shape[0], header.number("embedding_length")))
    for key in _SIZES:
        value = header.metadata.get(f"{header.architecture}.{key}", 0)
        largest = int(value.max()) if isinstance(value, np.ndarray) and len(value) else value
        if not isinstance(largest, int) or not 0 <= largest <= _MAX_SIZE:
            header.refuse(f"{header.architecture}.{key} is {ascii(value)[:40]}")


def _expect(header: Header, name: str, shape: tuple[int, ...]) -> None:
    """Raise ModelLoadError unless a tensor is there and has this shape."""
    tensor = header.tensors.get(name)
    if tensor is None:
        header.refuse(f"the tensor {name} is missing")
    if tensor.shape != shape:
        header.refuse(f"{name} has the shape {tensor.shape}, not {shape}")


def _refuse_unsupported(header: Header) -> None:
    name = f"GGUF of the family {header.architecture}"
    if header.architecture != "qwen3moe" and header.number("expert_count", 0):
        raise UnsupportedModelError(f"{name}: its experts are not supported")
    if header.number("attention.sliding_window", 0):
        raise UnsupportedModelError(f"{name}: its sliding window is not supported")
    lists = sorted(key for key, value in header.metadata.items() if isinstance(value, np.ndarray))
    for key in lists:
        if key.startswith(f"{header.architecture}."):
            raise UnsupportedModelError(f"{name}: its layers differ in shape ({key} is a list)")


def _head_dim(header: Header, default: int) -> int:
    """Return the size of attention heads, of which all three parts and the rotation must be."""
    rotated = header.number("rope.dimension_count", 0)
    head_dim = header.number("attention.key_length", rotated or default)
    value = header.number("attention.value_length", head_dim)
    if not head_dim == value == (rotated or head_dim):
        raise UnsupportedModelError(
            f"GGUF of the family {header.architecture}: heads of {head_dim} in K, {value} in V and "
            f"{rotated} rotated are not supported"
        )
    return head_dim


def _rope(header: Header) -> dict[str, Any]:
    """Return the parameters of rotary positions. Raises UnsupportedModelError on a scaling that
    is neither linear nor YaRN; factors in ROPE_FACTORS are applied after loading."""
    key = f"{header.architecture}.rope.scaling"
    rope: dict[str, Any] = {"rope_theta": header.real("rope.freq_base", 10000.0)}
    kind = header.metadata.get(f"{key}.type", "none")
    if (old := header.metadata.get(f"{header.architecture}.rope.scale_linear", 1.0)) != 1.0:
        return rope | {"rope_type": "linear", "factor": old}
    if kind == "none" or header.real("rope.scaling.factor", 1.0) == 1.0:
        return rope | {"rope_type": "default"}
    known = {f"{key}.{name}" for name in ("type", "factor", "original_context_length", "finetuned")}
    odd = sorted(name for name in header.metadata if name.startswith(key) and name not in known)
    if kind not in ("linear", "yarn") or odd:
        raise UnsupportedModelError(
            f"GGUF of the family {header.architecture}: rotary scaling {ascii(kind)[:40]} "
            f"{'with ' + ', '.join(odd) + ' ' if odd else ''}is not supported"
        )
    rope |= {"rope_type": kind, "factor": header.real("rope.scaling.factor")}
    if kind == "yarn":
        original = header.number("rope.scaling.original_context_length", 0)
        rope["original_max_position_embeddings"] = original or header.number("context_length")
    return rope


def _token_ids(header: Header) -> dict[str, Any]:
    """Return the ids of the tokens that begin, end and pad a text. Several may end one."""
    ids = {}
    for key in (*_END_KEYS, "bos_token_id", "padding_token_id"):
        value = header.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            header.refuse(f"tokenizer.ggml.{key} is {ascii(value)[:40]}, not a token id")
        ids[key] = value
    ends = sorted({ids[key] for key in _END_KEYS if key in ids})
    return {
        "eos_token_id": ends or None,
        "bos_token_id": ids.get("bos_token_id"),
        "pad_token_id": ids.get("padding_token_id"),
    }
