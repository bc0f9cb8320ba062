"""What is known of a model before it is loaded: from its configuration and the headers of its
files. No torch is imported, and no weight is read.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.gguf_config import FAMILIES, ROPE_FACTORS, config_values
from ..checkpoints.gguf_header import Header, read_header
from ..checkpoints.quantized_config import describe, weights_in
from ..checkpoints.source import Source, source_of
from ..config import EngineConfig
from ..errors import ModelLoadError, StartupError, UnsupportedModelError, one_line
from ..layers.layer_groups import LayerGroups, blocks_needed
from .model_spec import ModelSpec, read_hf_config, spec_from_hf_config

logger = logging.getLogger("quire.engine")

_BLOCK_SIZE = 16
"""Tokens of a block by default."""
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_SAFETENSORS_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8", 1),
    "F8_E5M2": ("float8", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
}
"""Names of types in safetensors, ours, and their bytes."""
_OTHER_PARTS = re.compile(
    r"(^|\.)(visual|vision_\w+|multi_modal_projector|connector|image_newline|audio_\w+)(\.|$)"
)
"""Names of weights that text does not pass through."""
MADE_DENSE = ".kv_b_proj."
"""In names of weights that no device keeps in groups: what makes keys and values of latents."""
_UNITS = 4 / 256
_GROUP_BYTES = {
    "Q2_K": 1 / 2 + 2 / 16 + _UNITS,
    "Q3_K": 1 / 2 + 1 / 16 + _UNITS,
    "Q4_0": 1 / 2 + 2 / 32,
    "Q4_1": 1 / 2 + 4 / 32,
    "Q4_K": 1 / 2 + 2 / 32 + _UNITS,
    "Q5_0": 1 + 2 / 32,
    "Q8_0": 1 + 2 / 32,
    "Q5_1": 1 + 4 / 32,
    "Q5_K": 1 + 2 / 32 + _UNITS,
    "Q6_K": 1 + 1 / 16 + _UNITS,
}
"""Bytes of a weight that stays in groups, by its type in the file: its integer, its share of the
scale and the minimum of a group, and of the units of both, as the CPU packs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutline:
    """What is known of a model before it is loaded. Fields are None if its files don't say, or
    aren't on this machine.

    `file_bytes` is the size of the weights in the files, `weight_bytes` their size as they are
    computed in `dtype`; `kv_bytes_per_token` covers K and V of all layers, and
    `state_bytes` what layers that keep a state keep for each sequence. `group_windows` has for
    each group of layers with blocks of its own how many of the latest tokens it keeps, None for
    all; a token takes `group_bytes_per_token` in each. `refused` is the reason why the model cannot
    be served, as far as configuration and headers tell.
    """

    model: str
    dtype: str
    architecture: str | None = None
    source_format: str | None = None
    num_parameters: int | None = None
    file_bytes: int | None = None
    weight_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    state_bytes: int = 0
    group_windows: tuple[int | None, ...] = (None,)
    group_bytes_per_token: int | None = None
    max_model_len: int | None = None
    refused: str | None = None

    def sequences(self, memory: int, num_tokens: int) -> int | None:
        """Return how many sequences of so many tokens have room in `memory` bytes beside the
        weights; None if that is not known."""
        if self.group_windows == (None,):
            if self.weight_bytes is None or not self.kv_bytes_per_token:
                return None
            each = num_tokens * self.kv_bytes_per_token + self.state_bytes
            return max(memory - self.weight_bytes, 0) // each
        if self.weight_bytes is None or not self.group_bytes_per_token:
            return None
        block_bytes = _BLOCK_SIZE * self.group_bytes_per_token
        num_blocks = max(memory - self.weight_bytes, 0) // block_bytes
        return num_blocks // blocks_needed(self.group_windows, _BLOCK_SIZE, num_tokens)

    def capacity(self, memory: int) -> int | None:
        """Return how many tokens of KV cache fit into `memory` bytes beside the weights, in
        sequences of `max_model_len` if groups of layers keep different numbers of tokens; negative
        if the weights alone are too large, None if that is not known."""
        if self.weight_bytes is None or not self.kv_bytes_per_token:
            return None
        free = memory - self.weight_bytes
        if self.group_windows == (None,) or not self.group_bytes_per_token:
            return free // self.kv_bytes_per_token
        assert self.max_model_len is not None
        block_bytes = _BLOCK_SIZE * self.group_bytes_per_token
        needed = blocks_needed(self.group_windows, _BLOCK_SIZE, self.max_model_len)
        return free * self.max_model_len // (needed * block_bytes)


class _Weights(NamedTuple):
    source_format: str
    num_parameters: int
    file_bytes: int
    weight_bytes: int


def outline(
    config: EngineConfig, *, keeps_groups: bool, kv_dtype: str | None = None
) -> ModelOutline:
    """Describe the configured model; "auto" for its dtype is that of the checkpoint.

    `keeps_groups` says whether the device computes grouped weights as they are. K and V are of
    `kv_dtype`, by default of the model's. A model that
    cannot be read or served gives its reason in `refused`.
    """
    known: dict[str, Any] = {"model": config.model, "dtype": config.dtype}
    try:
        source = source_of(config)
        if source.gguf is not None:
            header = read_header(source.gguf)
            known["architecture"] = header.architecture
            values = config_values(header)
            hf_config = None if values is None else _from_values(values)
        else:
            header, hf_config = None, read_hf_config(config)
        if hf_config is None:
            assert header is not None
            known |= _numbers(header)
        else:
            spec = spec_from_hf_config(hf_config, config)
            known |= {
                "architecture": spec.architecture,
                "max_model_len": spec.resolve_max_model_len(config.max_model_len),
                "state_bytes": 0 if spec.state is None else spec.state.num_bytes,
                "dtype": spec.dtype if config.dtype == "auto" else config.dtype,
            }
            _check_family(hf_config, spec)
        size = DTYPE_BYTES.get(known["dtype"], 4)
        kv_size = size if kv_dtype is None else DTYPE_BYTES[kv_dtype]
        if hf_config is not None:
            known |= _kv_sizes(spec, known["max_model_len"], kv_size)
        elif "kv_bytes_per_token" in known:
            known["kv_bytes_per_token"] *= kv_size
        quantization = getattr(hf_config, "quantization_config", None)
        weights = (
            _safetensors(source, size, quantization, keeps_groups=keeps_groups)
            if header is None
            else _gguf(header, size, keeps_groups=keeps_groups)
        )
        if weights is not None:
            known |= weights._asdict()
    except StartupError as error:
        known["refused"] = error.message
    return ModelOutline(**known)


def _kv_sizes(spec: ModelSpec, max_model_len: int, element_size: int) -> dict[str, Any]:
    """Return what K and V of a token take, in all layers and in one of their groups."""
    windows = spec.lines.windows
    groups = LayerGroups.choose(windows, max_model_len, _BLOCK_SIZE)
    if spec.state is not None:
        groups = LayerGroups.one_table(len(windows))
    size = spec.kv_bytes_per_token(element_size)
    return {
        "kv_bytes_per_token": size,
        "group_windows": groups.windows,
        "group_bytes_per_token": size // len(windows) * groups.num_places,
    }


def _from_values(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**values)


def _check_family(hf_config: Any, spec: ModelSpec) -> None:
    """Raise UnsupportedModelError if transformers has no class that could load the model."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    if hf_config.model_type not in known and not hasattr(hf_config, "auto_map"):
        raise UnsupportedModelError(
            f"{spec.architecture}: transformers has no causal language model of this family"
        )


def _numbers(header: Header) -> dict[str, Any]:
    """Return context and K and V elements of a token, for a family that transformers reads."""
    try:
        heads = header.number("attention.head_count")
        kv_heads = header.number("attention.head_count_kv", heads)
        width = header.number("attention.key_length", header.number("embedding_length") // heads)
        elements = 2 * header.number("block_count") * kv_heads * width
        return {
            "max_model_len": header.number("context_length"),
            "kv_bytes_per_token": elements,
            "dtype": "float32",
        }
    except (StartupError, ZeroDivisionError):  # layers differ: no one number
        return {"dtype": "float32"}


def _gguf(header: Header, size: int, *, keeps_groups: bool) -> _Weights:
    from gguf import GGMLQuantizationType

    number, file_bytes, weight_bytes = 0, 0, 0.0
    types: Counter[str] = Counter()
    keeps = keeps_groups and header.architecture in FAMILIES
    for name, tensor in header.tensors.items():
        if name == ROPE_FACTORS:
            continue
        kind = GGMLQuantizationType(tensor.type).name
        elements = prod(tensor.shape)
        is_matrix = len(tensor.shape) > 1 and "ffn_gate_inp" not in name  # a router is dense
        in_groups = _GROUP_BYTES.get(kind) if keeps and is_matrix else None
        number += elements
        file_bytes += tensor.num_bytes
        types[kind] += tensor.num_bytes
        weight_bytes += elements * (size if in_groups is None else in_groups)
    common = types.most_common(1)
    return _Weights(
        f"GGUF {common[0][0]}" if common else "GGUF", number, file_bytes, int(weight_bytes)
    )


def _safetensors(
    source: Source, size: int, quantization: Mapping[str, Any] | None, *, keeps_groups: bool
) -> _Weights | None:
    """Return what the headers of a model's safetensors say; None if they cannot be found."""
    number, file_bytes, weight_bytes = 0, 0, 0.0
    types: Counter[str] = Counter()
    for name, dtype, shape in _tensors(str(source.repository)):
        if _OTHER_PARTS.search(name):
            continue
        kind, width = _SAFETENSORS_DTYPES.get(dtype, (dtype, 1))
        weights, kept = prod(shape), None
        if quantization is not None:
            weights, kept = weights_in(quantization, name, shape)
            if MADE_DENSE in name:
                kept = None
        number += weights
        weight_bytes += weights * (kept if kept is not None and keeps_groups else size)
        file_bytes += prod(shape) * width
        types[kind] += prod(shape) * width
    if not types:
        return None
    name = f"safetensors {types.most_common(1)[0][0]}"
    if quantization is not None:
        name = describe(quantization)
    return _Weights(name, number, file_bytes, int(weight_bytes))


def _tensors(repository: str) -> Iterator[tuple[str, str, Sequence[int]]]:
    """Yield name, type and shape of a model's tensors: from the files of a folder or of the hub's
    local cache, or else from the headers of the files on the hub. Raises ModelLoadError."""
    from huggingface_hub import get_safetensors_metadata
    from safetensors import SafetensorError, safe_open

    files = _weight_files(repository)
    try:
        for file in files:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is not a mapping)
                    part = tensors.get_slice(name)
                    yield name, part.get_dtype(), part.get_shape()
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"cannot read the weights of {repository}: {one_line(error)}"
        ) from error
    if files or Path(repository).expanduser().is_dir():
        return
    try:
        remote = get_safetensors_metadata(repository)
    except Exception as error:  # no network, no such repository, none of its files
        logger.info("the size of %s is not known: %s", repository, one_line(error))
        return
    for one_file in remote.files_metadata.values():
        for name, tensor in one_file.tensors.items():
            yield name, tensor.dtype, tensor.shape


def _weight_files(repository: str) -> list[str]:
    """Return the safetensors files of a folder, or of a hub repository if all are in the local
    cache."""
    index = _local_file(repository, "model.safetensors.index.json")
    if index is None:
        names = ["model.safetensors"]
    else:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    found = [_local_file(repository, name) for name in names]
    return [] if None in found else [str(file) for file in found]


def _local_file(repository: str, name: str) -> str | None:
    """Return the path of a file in a folder, or in the local cache of a hub repository."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(repository).expanduser()
    if folder.is_dir():
        return str(folder / name) if (folder / name).is_file() else None
    found = try_to_load_from_cache(repository, name)
    return found if isinstance(found, str) else None
