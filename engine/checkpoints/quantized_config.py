"""What a model's config.json says of quantised weights, without torch.

`quantization_config` names a method. quire reads the tensors of some methods by itself; for a few
others transformers makes the weights dense; all others are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from ..config import EngineConfig, check_folder
from ..errors import ModelLoadError, UnsupportedModelError, one_line
from .source import source_of

OWN_METHODS = frozenset({"awq", "gptq", "compressed-tensors", "fp8", "fbgemm_fp8"})
"""Methods whose tensors quire reads by itself."""


class Dequantizer(NamedTuple):
    """How transformers makes the weights of a method dense: the class of its configuration, which
    gets dequantize=True, and the packages that this needs."""

    config_class: str
    packages: tuple[str, ...]


DEQUANTIZERS = {
    "mxfp4": Dequantizer("Mxfp4Config", ()),
    "mxfp8": Dequantizer("FineGrainedFP8Config", ("accelerate",)),
    "fp8": Dequantizer("FineGrainedFP8Config", ("accelerate",)),
    "compressed-tensors": Dequantizer(
        "CompressedTensorsConfig", ("compressed_tensors", "accelerate")
    ),
}
"""Methods whose weights transformers can make dense: those that quire does not read, and those of
models whose tensors have other names than their parameters."""

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
    if found is not None and not isinstance(found, dict):
        raise ModelLoadError(f"quantization_config of {config.model!r} is not an object")
    return found


def method_of(quantization: Mapping[str, Any]) -> str:
    """Return the name of the method, such as awq."""
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "bitsandbytes"
    return str(quantization.get("quant_method"))


def check_method(quantization: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError, with the reason, if checkpoints of this kind are not read."""
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


def require_packages(method: str, packages: tuple[str, ...]) -> None:
    """Raise UnsupportedModelError if packages that a method's weights need are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UnsupportedModelError(
            f"{method} weights need the package{'s' if len(missing) > 1 else ''} "
            f"{' and '.join(missing).replace('_', '-')}: pip install 'quire[quantized]'"
        )


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
    raise UnsupportedModelError(f"quantised checkpoints of {ascii(method)[1:41]}: {reason}")


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
