"""Scales of a float8 KV cache, read from checkpoints that were calibrated for one.

A layer has one number for K and one for V, or one for each KV head; the cache holds K and V divided
by them. They are tensors beside the layer's weights, under the names that quantisation tools give:

    model.layers.3.self_attn.k_scale    …self_attn.attn.k_scale    …self_attn.k_proj.k_scale
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import torch

from ..errors import ModelLoadError
from .model_spec import ModelSpec

logger = logging.getLogger("quire.engine")

_NAME = re.compile(r"\.layers\.(\d+)\.self_attn\.(?:attn\.|[kv]_proj\.)?([kv])_scale$")


def read_kv_scales(model: str, spec: ModelSpec) -> torch.Tensor | None:
    """Read the scales `[num_layers, 2, num_kv_heads]` float32 of a folder or a hub id.

    A layer without scales gets 1; None if no layer has any. Raises ModelLoadError on a scale that
    has another shape or is not positive.
    """
    from safetensors import safe_open

    scales = torch.ones(spec.num_layers, 2, spec.num_kv_heads)
    layers = spec.kv_layers or range(spec.num_layers)
    numbers = {layer: number for number, layer in enumerate(layers)}
    found = 0
    for file in _weight_files(model):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is not a mapping)
                match = _NAME.search(name)
                if match is None or int(match[1]) not in numbers:
                    continue
                scale = tensors.get_tensor(name).float().flatten()
                if (
                    len(scale) not in (1, spec.num_kv_heads)
                    or not ((scale > 0) & scale.isfinite()).all()
                ):
                    raise ModelLoadError(f"{name} of {model!r} is not a scale of a KV cache")
                scales[numbers[int(match[1])], "kv".index(match[2])] = scale
                found += 1
    logger.info("%d of %d scales of the float8 KV cache found", found, 2 * spec.num_layers)
    return scales if found else None


def _weight_files(model: str) -> list[str]:
    """Return the safetensors files that may hold scales: those that the index names for them, or
    the only one."""
    from transformers.utils import cached_file

    try:
        index = cached_file(model, "model.safetensors.index.json")
    except OSError:  # the weights are not split
        return [str(cached_file(model, "model.safetensors"))]
    weight_map: dict[str, str] = json.loads(Path(str(index)).read_text("utf-8"))["weight_map"]
    names = sorted({file for name, file in weight_map.items() if _NAME.search(name)})
    return [str(cached_file(model, name)) for name in names]
