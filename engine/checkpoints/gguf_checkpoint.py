"""A GGUF file as a checkpoint: its tensors under the names of a transformers model's parameters.

Names are translated by the package gguf's own table. Files of the families of gguf_config.FAMILIES
keep their blocks; those of any other family are loaded, dequantised, by transformers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..body.grouped_linear import GroupedWeight, common_form
from ..body.grouped_rows import is_read_by_rows, stack_parts
from ..config import EngineConfig
from ..errors import ModelLoadError, QuireError, UnsupportedModelError, one_line
from .gguf_blocks import KEPT_TYPES, keep_blocks, make_dense, type_name
from .gguf_config import FAMILIES, ROPE_FACTORS, complete_config, config_values
from .gguf_header import Header, TensorInfo, read_header
from .source import source_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger("quire.engine")

_HEAD, _EMBEDDING = "lm_head.weight", "token_embd.weight"


class GgufCheckpoint:
    """Implements Checkpoint, which states the contract."""

    def __init__(self, config: EngineConfig) -> None:
        file = source_of(config).gguf
        assert file is not None  # otherwise the format is another
        self._file: Path = file
        self._header: Header = read_header(file)
        self._family = FAMILIES.get(self._header.architecture)

    @property
    def source_format(self) -> str:
        sizes: Counter[str] = Counter()
        for tensor in self._header.tensors.values():
            sizes[type_name(tensor.type)] += tensor.num_bytes
        return f"GGUF {sizes.most_common(1)[0][0]}" if sizes else "GGUF"

    @property
    def load_arguments(self) -> dict[str, Any] | None:
        if self._family is not None:
            return None
        from transformers import GgufConfig

        return {
            "pretrained_model_name_or_path": str(self._file.parent),
            "gguf_file": self._file.name,
            "quantization_config": GgufConfig(dequantize=True),
        }

    def hf_config(self) -> Any:
        from transformers import AutoConfig

        values = config_values(self._header)
        try:
            if values is not None:
                return AutoConfig.for_model(**values)
            folder, name = str(self._file.parent), self._file.name
            config = AutoConfig.from_pretrained(folder, gguf_file=name)
            complete_config(self._header, config)
            return config
        except QuireError:
            raise
        except Exception as error:  # whatever odd values make transformers' validation raise
            if "is not supported" in str(error):
                raise UnsupportedModelError(
                    f"GGUF of the family {ascii(self._header.architecture)[:40]} is not supported "
                    "by this transformers"
                ) from error
            raise ModelLoadError(
                f"cannot read the configuration of {self._file}: {one_line(error)}"
            ) from error

    def weights(
        self,
        model: nn.Module,
        *,
        keep_groups: bool,
        keep_float8: bool = False,
        keep_rows: bool = False,
    ) -> Iterator[tuple[str, torch.Tensor | GroupedWeight]]:
        # 1. Find the tensors of every parameter, before anything is read.
        places = self._places(model)
        linears = {
            f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear
        }
        keepable = linears if keep_groups else set()
        if keep_rows:
            keepable = keepable | {name for name in places if is_read_by_rows(name, model)}
        kept_embedding: GroupedWeight | None = None
        in_file, in_memory = Counter[str](), Counter[str]()
        data = np.memmap(self._file, np.uint8, "r")
        # 2. Read them one after the other: kept if they can be, or else made dense.
        for name, (tensors, shape) in places.items():
            kinds = sorted({type_name(tensor.type) for tensor in tensors})
            is_kept = name in keepable and KEPT_TYPES.issuperset(kinds)
            weight: torch.Tensor | GroupedWeight
            if is_kept:
                groups = common_form([self._grouped(tensor, data, model) for tensor in tensors])
                weight = stack_parts(groups, shape[0])
            else:
                parts = [self._dense(tensor, data, model) for tensor in tensors]
                weight = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).view(shape)
            if isinstance(weight, GroupedWeight) and tensors[0].name == _EMBEDDING:
                kept_embedding = weight
            what = f"{' and '.join(kinds)} {'kept in blocks' if is_kept else 'made dense'}"
            in_file[what] += sum(tensor.num_bytes for tensor in tensors)
            if isinstance(weight, torch.Tensor):
                in_memory[what] += weight.nbytes
            yield name, weight
        # 3. A tied head has no tensor of its own. It is kept as the embedding is, or beside it.
        embedding = self._header.tensors[_EMBEDDING]
        tied = _HEAD in linears and _HEAD not in places
        if keep_groups and tied and type_name(embedding.type) in KEPT_TYPES:
            yield _HEAD, kept_embedding or self._grouped(embedding, data, model)
        for what, size in sorted(in_file.items()):
            made = f", as {in_memory[what] / 1e6:.1f} MB" if what in in_memory else ""
            logger.info("GGUF: %.1f MB of %s%s", size / 1e6, what, made)

    def finish(self, model: nn.Module) -> None:
        """Divide the rotary frequencies by the file's factors, if it has any. Raises ModelLoadError
        if weights that transformers has loaded are not finite."""
        if self._family is None:
            for name, parameter in model.named_parameters():
                if not parameter.isfinite().all():
                    self._header.refuse(f"{name} has numbers that are not finite")
            return
        tensor = self._header.tensors.get(ROPE_FACTORS)
        if tensor is None:
            return
        data = np.memmap(self._file, np.uint8, "r")
        factors = self._dense(tensor, data, model).float().flatten()
        for module in model.modules():
            frequencies = getattr(module, "inv_freq", None)
            if not isinstance(frequencies, torch.Tensor):
                continue
            if len(factors) != len(frequencies) or not (factors > 0).all():
                self._header.refuse(f"{ROPE_FACTORS} does not fit the rotary positions")
            frequencies.copy_(frequencies.float() / factors)

    def _places(
        self, model: nn.Module
    ) -> dict[str, tuple[tuple[TensorInfo, ...], tuple[int, ...]]]:
        """Return for each parameter its tensors and its shape. Raises ModelLoadError."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        header = self._header
        [arch] = (key for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
        translation = get_tensor_name_map(arch, header.number("block_count"))
        left = dict(header.tensors)
        left.pop(ROPE_FACTORS, None)
        places = {}
        missing = []
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            tensors = []
            for alias, part in _parts(name, shape):
                base, dot, suffix = alias.rpartition(".")
                if suffix not in ("weight", "bias"):
                    base, dot, suffix = alias, ".", "weight"
                found = left.pop(f"{translation.get_name(base)}{dot}{suffix}", None)
                if found is None:
                    missing.append(name)
                    continue
                if found.shape != part:
                    header.refuse(f"{found.name} has the shape {found.shape}, not {part}")
                tensors.append(found)
            places[name] = (tuple(tensors), shape)
        if missing:
            header.refuse(f"{len(missing)} tensors are missing, the first of {missing[0]}")
        if left:
            header.refuse(
                f"{len(left)} tensors have no place in {type(model).__name__}, the first "
                f"{ascii(next(iter(left))[:80])}"
            )
        return places

    def _rows(self, tensor: TensorInfo, data: NDArray[np.uint8], model: Any) -> NDArray[np.uint8]:
        """Return the tensor's bytes by row, `[rows, bytes]`, in the order of transformers."""
        raw = data[tensor.offset : tensor.offset + tensor.num_bytes]
        length = int(np.prod(tensor.shape[:-1], dtype=np.int64)) if len(tensor.shape) > 1 else 1
        rows = raw.reshape(length, -1)
        config = model.config
        assert self._family is not None  # others are loaded by transformers
        if self._family.permuted and (".attn_q." in tensor.name or ".attn_k." in tensor.name):
            is_query = ".attn_q." in tensor.name
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            if len(tensor.shape) == 1:  # a bias: its elements are what rows are in a weight
                rows = raw.reshape(tensor.shape[0], -1)
            rows = rows[_split_pairs(len(rows), heads)]
        return rows

    def _grouped(self, tensor: TensorInfo, data: NDArray[np.uint8], model: Any) -> GroupedWeight:
        weight = keep_blocks(tensor.type, self._rows(tensor, data, model))
        self._check_finite(tensor, weight.scale)
        if weight.minimum is not None:
            self._check_finite(tensor, weight.minimum)
        return weight

    def _dense(self, tensor: TensorInfo, data: NDArray[np.uint8], model: Any) -> torch.Tensor:
        weight = make_dense(tensor.type, self._rows(tensor, data, model), tensor.shape)
        self._check_finite(tensor, weight)
        offset = 0.0 if self._family is None else self._family.norm_offset
        return weight - offset if offset and "norm" in tensor.name else weight

    def _check_finite(self, tensor: TensorInfo, values: torch.Tensor) -> None:
        smallest, largest = values.aminmax()  # NaN if any is
        if not (smallest.isfinite() and largest.isfinite()):
            self._header.refuse(f"{tensor.name} has numbers that are not finite")


def _parts(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names by which gguf knows a parameter, and the shapes of its tensors: experts
    have gate and up in one parameter, but in two tensors."""
    if name.endswith(".experts.gate_up_proj"):
        half = (shape[0], shape[1] // 2, shape[2])
        stem = name.removesuffix("gate_up_proj")
        return [(f"{stem}gate_proj", half), (f"{stem}up_proj", half)]
    return [(name, shape)]


def _split_pairs(length: int, heads: int) -> NDArray[np.int64]:
    """Return the order of rows in which the halves of each head's rotary pairs are apart, as
    transformers has them: llama.cpp puts the two of a pair next to each other."""
    pairs = np.arange(length).reshape(heads, -1, 2)
    return pairs.swapaxes(1, 2).reshape(-1)
