"""Quantised safetensors as a checkpoint: AWQ, GPTQ, compressed-tensors and float8.

quire reads the tensors of models whose parameters have the same names in the files. For others,
transformers makes the weights dense, if it can.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from ..body.grouped_linear import GroupedWeight
from ..config import EngineConfig
from ..errors import ModelLoadError, UnsupportedModelError, one_line
from .quantized_config import (
    DEQUANTIZERS,
    OWN_METHODS,
    check_method,
    describe,
    method_of,
    quantization_of,
    require_packages,
)
from .quantized_layers import Layout, find_layout
from .source import source_of
from .tensor_files import StoredTensor, TensorFiles

logger = logging.getLogger("quire.engine")

_BESIDE = re.compile(
    r"(\.(input|output|activation)_(scale|zero_point|global_scale)"
    r"|\.(weight_shape|[kvq]_scale|[kvq]_zero_point)|rotary_emb\.inv_freq)$"
)
"""Names of tensors that are no weights: scales of activations and of a KV cache, shapes, and
buffers that older checkpoints hold."""
_LAYERS = re.compile(r"\.layers\.(\d+)\.")


class _Place(NamedTuple):
    """Where a parameter, or one expert's part of it, is stored: in a plain tensor, or in the
    tensors of a layout, under this name without its last part."""

    base: str
    plain: str | None
    layout: Layout | None
    shape: tuple[int, ...]


class QuantizedCheckpoint:
    """Implements Checkpoint, which states the contract."""

    def __init__(self, config: EngineConfig) -> None:
        quantization = quantization_of(config)
        repository = source_of(config).repository
        assert quantization is not None and repository is not None  # otherwise no format of its own
        check_method(quantization)
        self._quantization: Mapping[str, Any] = quantization
        self._method = method_of(quantization)
        self._config, self._repository = config, repository
        self._hf_config = self._read_config()
        self._buffers: dict[str, torch.Tensor] = {}
        self._is_own = self._method in OWN_METHODS and not self._has_other_parts()
        if self._is_own:
            require_packages(self._method, ("accelerate",))  # builds models without memory
        elif self._method in DEQUANTIZERS:
            require_packages(self._method, DEQUANTIZERS[self._method])
            logger.info("%s weights are made dense by transformers", self._method)
        else:
            raise UnsupportedModelError(
                f"quantised checkpoints of {self._method}: models with encoders are not read"
            )

    @property
    def source_format(self) -> str:
        return describe(self._quantization)

    @property
    def load_arguments(self) -> dict[str, Any] | None:
        if self._is_own:
            return None
        return {
            "pretrained_model_name_or_path": self._repository,
            "use_safetensors": True,
            "trust_remote_code": self._config.trust_remote_code,
        }

    def hf_config(self) -> Any:
        found = copy.deepcopy(self._hf_config)
        if not self._is_own:
            found.quantization_config = {**self._quantization, "dequantize": True}
            return found
        for name in ("quantization_config", "compression_config"):
            if hasattr(found, name):
                delattr(found, name)
        return found

    def weights(
        self,
        model: nn.Module,
        *,
        keep_groups: bool,
        keep_float8: bool = False,
        keep_rows: bool = False,
    ) -> Iterator[tuple[str, torch.Tensor | GroupedWeight]]:
        # 1. Find the tensors of every parameter, before any number is read.
        files = TensorFiles(self._repository)
        places = self._places(model, files)
        linears = {
            f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear
        }
        # 2. Read them one after the other: kept if they can be, or else made dense.
        in_files, in_memory = Counter[str](), Counter[str]()
        for name, parameter in list(model.named_parameters()):
            parts = places[name]
            weight: torch.Tensor | GroupedWeight
            if len(parts) == 1 and parts[0].shape == tuple(parameter.shape):
                weight = self._read(files, parts[0])
            else:
                weight = torch.empty(parameter.shape, dtype=parameter.dtype)
                rows = torch.split(
                    weight.view(-1, parameter.shape[-1]), [one.shape[0] for one in parts]
                )
                for part, target in zip(parts, rows, strict=True):
                    target.copy_(_dense(self._read(files, part)))
            what = parts[0].layout.name if parts[0].layout is not None else "plain"
            if what != "plain" and len(parts) == 1 and isinstance(weight, torch.Tensor):
                what += _why_dense(what)
            if isinstance(weight, GroupedWeight):
                is_float = weight.quants.is_floating_point()
                if name not in linears or not (keep_float8 if is_float else keep_groups):
                    weight = weight.dense().to(parameter.dtype)
            if what != "plain":
                if isinstance(weight, GroupedWeight):
                    what, size = f"{what} kept", weight.num_bytes
                else:
                    dtype = str(parameter.dtype).removeprefix("torch.")
                    what, size = f"{what} made dense {dtype}", parameter.nbytes
                in_files[what] += sum(_num_bytes(files, part) for part in parts)
                in_memory[what] += size
            yield name, weight
        for what, size in sorted(in_files.items()):
            ratio = in_memory[what] / size
            logger.info("%.1f MB of %s: %.2f times their size", size / 1e6, what, ratio)

    def finish(self, model: nn.Module) -> None:
        """Set the buffers that the files hold, such as the corrections of a router."""
        for name, values in self._buffers.items():
            model.get_buffer(name).copy_(values)

    def _read_config(self) -> Any:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(
                self._config.model, trust_remote_code=self._config.trust_remote_code
            )
        except Exception as error:  # whatever a broken file makes json, hub or validation raise
            if not self._config.trust_remote_code and "trust_remote_code" in str(error):
                raise ModelLoadError(
                    f"{self._config.model!r} needs code of its own to be executed; "
                    "--trust-remote-code does"
                ) from error
            raise ModelLoadError(
                f"cannot read the configuration of {self._config.model!r}: {one_line(error)}"
            ) from error

    def _has_other_parts(self) -> bool:
        return self._hf_config.get_text_config(decoder=True) is not self._hf_config

    def _places(self, model: nn.Module, files: TensorFiles) -> dict[str, list[_Place]]:
        """Return for each parameter its place, or those of its experts. Raises ModelLoadError."""
        # 1. Group the tensors by the name of their layer.
        layers: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in files.tensors.items():
            base, _, last = name.rpartition(".")
            layers.setdefault(base, {})[last] = tensor
        left = {name for name in files.tensors if not _BESIDE.search(name)}
        if self._rounds_activations():
            logger.info(
                "the checkpoint rounds activations too; here they are rounded only if the device "
                "multiplies by 8 bits, by scales of its own"
            )
        # 2. Find the tensors of each parameter. A body that was saved alone has shorter names.
        prefix = f"{model.base_model_prefix}."
        if not any(name.startswith(prefix) for name in files.tensors):
            prefix = ""
        places: dict[str, list[_Place]] = {}
        missing = []
        for name, parameter in model.named_parameters():
            places[name] = []
            short = name if prefix else name.removeprefix(f"{model.base_model_prefix}.")
            for alias, shape in _aliases(short, tuple(parameter.shape), layers):
                place = self._place(alias, shape, layers)
                if place is None:
                    missing.append(alias)
                    continue
                places[name].append(place)
                names = place.layout.parts if place.layout is not None else (place.plain,)
                left -= {f"{place.base}.{last}" for last in names}
        # 3. Find the buffers.
        for name in _kept_buffers(model):
            stored = files.tensors.get(name)
            if stored is None or stored.shape != tuple(model.get_buffer(name).shape):
                missing.append(name)
                continue
            self._buffers[name] = files.read(name)
            left.discard(name)
        if missing:
            self._refuse(f"{len(missing)} weights are missing, the first {missing[0]}")
        self._check_left(left, model, files)
        return places

    def _check_left(self, left: set[str], model: Any, files: TensorFiles) -> None:
        """Raise ModelLoadError if tensors are left over. A tied head's may be, and those of layers
        after the last, and biases of zeros, which some writers of GPTQ add."""
        if getattr(model.config, "tie_word_embeddings", False):
            left = {name for name in left if not name.startswith("lm_head.")}
        left = {name for name in left if not _is_of_later_layer(name, model)}
        left = {name for name in left if not name.endswith(".bias") or files.read(name).any()}
        if left:
            first = ascii(min(left))[:80]
            self._refuse(
                f"{len(left)} tensors have no place in {type(model).__name__}, the first {first}"
            )

    def _place(
        self, name: str, shape: tuple[int, ...], layers: Mapping[str, Mapping[str, StoredTensor]]
    ) -> _Place | None:
        """Return the place of a parameter of this name; None if there are no tensors of it."""
        base, _, last = name.rpartition(".")
        tensors = layers.get(base, {})
        layout = None
        if last == "weight" and len(shape) == 2:
            block = self._quantization.get("weight_block_size") or self._block_structure()
            try:
                layout = find_layout(
                    tensors,
                    (shape[0], shape[1]),
                    is_awq=self._method == "awq",
                    first_zero=int(self._quantization.get("checkpoint_format") != "gptq_v2"),
                    block=None if block is None else (int(block[0]), int(block[1])),
                )
            except ValueError as error:
                self._refuse(f"{base}: {error}")
        if layout is not None:
            return _Place(base, None, layout, shape)
        if last not in tensors:
            return None
        if tensors[last].shape != shape:
            self._refuse(f"{name} has the shape {tensors[last].shape}, not {shape}")
        return _Place(base, last, None, shape)

    def _rounds_activations(self) -> bool:
        groups = (self._quantization.get("config_groups") or {}).values()
        return bool(self._quantization.get("activation_scheme")) or any(
            group.get("input_activations") for group in groups
        )

    def _block_structure(self) -> Any:
        """Return the rows and columns of a block in compressed-tensors; None if there are none."""
        for group in (self._quantization.get("config_groups") or {}).values():
            structure = (group.get("weights") or {}).get("block_structure")
            if structure is not None:
                return structure
        return None

    def _read(self, files: TensorFiles, place: _Place) -> torch.Tensor | GroupedWeight:
        if place.layout is None:
            weight = files.read(f"{place.base}.{place.plain}")
            if weight.is_floating_point() and weight.numel():
                smallest, largest = weight.aminmax()
                if not (smallest.isfinite() and largest.isfinite()):
                    self._refuse(f"{place.base}.{place.plain} has numbers that are not finite")
            return weight
        try:
            return place.layout.read(lambda last: files.read(f"{place.base}.{last}"))
        except ValueError as error:
            self._refuse(f"{place.base}: {error}")

    def _refuse(self, reason: str) -> NoReturn:
        raise ModelLoadError(f"cannot load {self._repository!r}: {reason}")


def _aliases(
    name: str, shape: tuple[int, ...], layers: Mapping[str, object]
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names in the files of a parameter, with their shapes. The experts of a layer have
    one parameter, but a tensor each: gate_proj, up_proj and down_proj, or Mixtral's w1, w3, w2."""
    stem, dot, last = name.rpartition(".experts.")
    if not dot or last not in ("gate_up_proj", "down_proj") or len(shape) != 3:
        return [(name, shape)] if name.rpartition(".")[0] in layers else [(_old(name), shape)]
    number, rows, columns = shape
    names, stems = ["gate_proj", "up_proj"], [f"{stem}.experts", f"{_old(stem)}.experts"]
    if last == "down_proj":
        names = ["down_proj"]
    used = next((one for one in stems if any(key.startswith(f"{one}.0.") for key in layers)), stem)
    if f"{used}.0.w1" in layers:
        names = [{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[one] for one in names]
    part = (rows // len(names), columns)
    return [(f"{used}.{expert}.{one}.weight", part) for expert in range(number) for one in names]


def _kept_buffers(model: nn.Module) -> list[str]:
    """Return the names of the buffers that are saved with a model."""
    saved = model.state_dict().keys()
    return [name for name, _ in model.named_buffers() if name in saved]


def _old(name: str) -> str:
    """Return a name as Mixtral's files have it."""
    return name.replace(".mlp", ".block_sparse_moe")


def _is_of_later_layer(name: str, model: Any) -> bool:
    """Whether a tensor is of a layer after the model's last: a head that predicts more tokens."""
    found = _LAYERS.search(name)
    if name.startswith("mtp."):
        return True
    return found is not None and int(found[1]) >= model.config.num_hidden_layers


def _why_dense(layout: str) -> str:
    """Say why a layer's integers do not fit groups."""
    if layout == "float8":
        return " in blocks that do not divide a row"
    return " with inputs in another order"


def _dense(weight: torch.Tensor | GroupedWeight) -> torch.Tensor:
    return weight.dense() if isinstance(weight, GroupedWeight) else weight


def _num_bytes(files: TensorFiles, place: _Place) -> int:
    names = place.layout.parts if place.layout is not None else (place.plain,)
    return sum(files.read(f"{place.base}.{last}").nbytes for last in names)
