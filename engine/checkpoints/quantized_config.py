"""What a model's config.json says of quantised weights, without torch.

`quantization_config` names a method. quire reads the tensors of some methods by itself; for a few
others transformers makes the weights dense; all others are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import prod
from typing import Any

from ..config import EngineConfig
from ..errors import ModelLoadError, UnsupportedModelError, check_folder, one_line
from .source import source_of

OWN_METHODS = frozenset({"awq", "gptq", "compressed-tensors", "fp8", "fbgemm_fp8"})
"""Methods whose tensors quire reads by itself."""


DEQUANTIZERS: dict[str, tuple[str, ...]] = {
    "compressed-tensors": ("compressed_tensors", "accelerate"),
    "fp8": ("accelerate",),
    "mxfp4": (),
    "mxfp8": ("accelerate",),
}
"""Methods whose weights transformers makes dense, if their configuration says "dequantize", and the
packages that it needs: those that quire does not read, and those of models whose tensors have other
names than their parameters."""

_REASONS = {
    "bitsandbytes": "its weights can only be read by the package bitsandbytes",
    "modelopt": "its formats NVFP4 and FP8 are not read",
    "nvfp4": "NVFP4 has two levels of scales, and products for it need a Blackwell GPU",
}
"""Why some methods are not served."""
_FORMATS = frozenset(
    {
        "dense",
        "float-quantized",
        "int-quantized",
        "mixed-precision",
        "naive-quantized",
        "pack-quantized",
    }
)
"""The formats of compressed-tensors that are read."""

_SCALES = re.compile(r"scales?$|scale_inv$|zeros$|zero_point$|g_idx$|weight_shape$")
"""Last parts of the names of tensors beside the weights of a quantised layer."""


def quantization_of(config: EngineConfig) -> Mapping[str, Any] | None:
    """Return the `quantization_config` of the configured model; None if it has none, or is a GGUF
    file. Raises ModelLoadError if config.json cannot be read."""
    source = source_of(config)
    if source.repository is None or source.gguf is not None:
        return None
    check_folder(source.repository)
    values = _config_values(source.repository)
    found = values.get("quantization_config") or values.get("compression_config")
    if found is None:
        text = values.get("text_config")
        found = text.get("quantization_config") if isinstance(text, dict) else None
    if found is not None:
        _check_values(found)
    return found


def method_of(quantization: Mapping[str, Any]) -> str:
    """Return the name of the method, such as awq."""
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "bitsandbytes"
    return str(quantization.get("quant_method"))


def check_method(quantization: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError, with the reason, if checkpoints of this kind are not read, and
    ModelLoadError if values are of other types than they should be."""
    _check_values(quantization)
    method = method_of(quantization)
    if method not in OWN_METHODS and method not in DEQUANTIZERS:
        reason = _REASONS.get(method.removesuffix("_fp4"), "its format is not known here")
        _refuse(method, reason)
    if method == "awq":
        version = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
        if version != "gemm":
            _refuse(method, f"its layout {version!r} is not read, only that of GEMM is")
    if method == "gptq":
        version = str(quantization.get("checkpoint_format") or "gptq")
        if version not in ("gptq", "gptq_v2"):
            _refuse(method, f"its layout {version!r} is not read, only gptq and gptq_v2 are")
    if method == "compressed-tensors":
        _check_compressed(quantization)


def describe(quantization: Mapping[str, Any]) -> str:
    """Return the format for people to read, such as "safetensors gptq 4 bits"."""
    method = method_of(quantization)
    bits = quantization.get("bits") or quantization.get("w_bit")
    detail = {
        "awq": f"{bits or 4} bits",
        "gptq": f"{bits} bits",
        "compressed-tensors": quantization.get("format"),
        "fp8": "blocks" if quantization.get("weight_block_size") else None,
    }.get(method)
    return f"safetensors {method}" + (f" {detail}" if detail else "")


def weights_in(
    quantization: Mapping[str, Any], name: str, shape: Sequence[int]
) -> tuple[int, float | None]:
    """Return how many weights a stored tensor holds, none if it holds scales or the like; and the
    bytes of each if its groups are kept, with scale and minimum, or None if it is made dense."""
    groups = (quantization.get("config_groups") or {}).values()
    about = next((group["weights"] for group in groups if group.get("weights")), quantization)
    bits = int(about.get("num_bits") or about.get("bits") or about.get("w_bit") or 4)
    size = int(about.get("group_size") or -1)
    kept = bits / 8 + (8 / size if size > 0 else 0.0)
    last = name.rpartition(".")[2]
    if last in ("qweight", "weight_packed"):
        return prod(shape) * 32 // bits, None if ".experts." in name else kept
    if last.endswith("_blocks"):
        return 2 * prod(shape), None
    if _SCALES.search(last):
        return 0, None
    is_integer = last == "weight" and about.get("type") == "int" and "_proj" in name
    return prod(shape), kept if is_integer and ".experts." not in name else None


def require_packages(method: str, packages: tuple[str, ...]) -> None:
    """Raise UnsupportedModelError if packages that a method's weights need are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UnsupportedModelError(
            f"{method} weights need the package{'s' if len(missing) > 1 else ''} "
            f"{' and '.join(missing).replace('_', '-')}: pip install 'quire-server[quantized]'"
        )


def _check_values(quantization: Any) -> None:
    """Raise ModelLoadError if values that are read are of other types than they should be."""

    def check(condition: bool, name: str) -> None:
        if not condition:
            raise ModelLoadError(f"quantization_config has a wrong value: {name}")

    check(isinstance(quantization, dict), "it is no object")
    for name in ("config_groups", "sparsity_config", "transform_config"):
        check(isinstance(quantization.get(name) or {}, dict), name)
    groups = list((quantization.get("config_groups") or {}).values())
    check(all(isinstance(group, dict) for group in groups), "config_groups")
    weights = [group.get("weights") or {} for group in groups]
    check(all(isinstance(about, dict) for about in weights), "config_groups")
    for about in (quantization, *weights):
        for name in ("bits", "w_bit", "num_bits", "group_size"):
            value = about.get(name)
            check(value is None or (type(value) is int and value >= -1), name)
        for name in ("weight_block_size", "block_structure"):
            block = about.get(name)
            if block is not None:
                check(isinstance(block, list) and len(block) == 2, name)
                check(all(type(size) is int and size > 0 for size in block), name)


def _check_compressed(quantization: Mapping[str, Any]) -> None:
    method = "compressed-tensors"
    groups = quantization.get("config_groups") or {}
    formats = {str(quantization.get("format") or "dense")}
    formats |= {str(group["format"]) for group in groups.values() if group.get("format")}
    unread = sorted(formats - _FORMATS)
    if unread:
        _refuse(method, f"its format {unread[0]!r} is not read")
    sparsity = quantization.get("sparsity_config") or {}
    if (sparsity.get("format") or "dense") != "dense":
        _refuse(method, f"sparse weights ({sparsity['format']}) are not read")
    transforms = (quantization.get("transform_config") or {}).get("config_groups")
    if transforms:
        _refuse(method, "its activations are rotated (transform_config), which is not computed")


def _refuse(method: str, reason: str) -> None:
    raise UnsupportedModelError(f"quantised checkpoints of {ascii(method[:40])}: {reason}")


def _config_values(repository: str) -> dict[str, Any]:
    """Return the values of a repository's config.json."""
    from transformers import PreTrainedConfig

    try:
        values, _ = PreTrainedConfig.get_config_dict(repository)
    except Exception as error:  # whatever a broken file or the hub raises
        raise ModelLoadError(
            f"cannot read the configuration of {repository!r}: {one_line(error)}"
        ) from error
    return dict(values)
