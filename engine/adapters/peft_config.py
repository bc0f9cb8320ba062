"""The configuration of a LoRA adapter as PEFT writes it: adapter_config.json.

A field that changes what is computed is either served or refused by name. Fields that only matter
to training are ignored.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InvalidRequestError

MAX_CONFIG_BYTES = 1 << 20
"""Maximum size of an adapter_config.json."""

_SERVED = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"),
        "init_lora_weights",
    }
)
_TRAINING_ONLY = frozenset(
    {
        *(
            "auto_mapping",
            "base_model_name_or_path",
            "corda_config",
            "eva_config",
            "inference_mode",
        ),
        *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version"),
        *("qalora_group_size", "revision", "runtime_config", "task_type"),
    }
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to initialise an adapter that also change the weights of the model it belongs to."""


def refuse(message: str) -> InvalidRequestError:
    """Return the error that refuses an adapter's folder."""
    return InvalidRequestError(message, "lora_path")


class PeftConfig(NamedTuple):
    """The fields of adapter_config.json that decide what an adapter computes."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    layers: list[int] | None
    layers_pattern: list[str]

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """Return the factor s of s · B A: alpha / rank, or alpha / √rank with rsLoRA (arXiv
        2312.03732)."""
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return float(alpha / rank**0.5 if self.use_rslora else alpha / rank)

    def targets(self, module: str) -> bool:
        """Return whether the adapter is for this module, by PEFT's rules."""
        if _is_among(module, self.exclude_modules):
            return False
        if self.target_modules == "all-linear":
            return True
        if not _is_among(module, self.target_modules):
            return False
        if self.layers is None or isinstance(self.target_modules, str):
            return True
        patterns = [rf"(?:^|.*?\.){one}\.(\d+)\." for one in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if (match := re.match(pattern, module)) is not None:
                return int(match[1]) in self.layers
        return False


def _matching(patterns: dict[str, Any], module: str) -> str:
    """Return the first pattern that matches the end of a module's name, or an empty string."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), "")


def _is_among(module: str, names: str | list[str]) -> bool:
    """Return whether a module's name matches the regular expression `names`, or is, or ends with,
    one of the list."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def read_config(folder: Path) -> PeftConfig:
    """Read adapter_config.json. Raises InvalidRequestError if it is broken or not served."""
    path = folder / "adapter_config.json"
    if path.exists() and not path.is_file():  # to read a pipe would take for ever
        raise refuse(f"cannot read {path}: it is no regular file")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise refuse(f"{path} is larger than {MAX_CONFIG_BYTES} bytes")
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise refuse(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise refuse(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise refuse(f"{path} is not a JSON object")
    _check_served(fields)
    try:
        config = _parse(fields)
        for pattern in (*config.rank_pattern, *config.alpha_pattern, *config.layers_pattern):
            re.compile(pattern)
        for names in (config.target_modules, config.exclude_modules):
            re.compile(names if isinstance(names, str) else "")
    except (TypeError, ValueError, KeyError, re.error) as error:
        raise refuse(f"{path}: {error}") from error
    return config


def _check_served(fields: dict[str, Any]) -> None:
    """Raise InvalidRequestError, naming the field, if an adapter of this kind is not served."""
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise refuse(f"peft_type {kind!r} is not supported, only LORA is")
    if fields.get("bias", "none") != "none":
        raise refuse(f"bias {fields['bias']!r} is not supported: the adapter must have none")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise refuse(
            f"init_lora_weights {init!r} is not supported, since it changes the base model: save "
            "the adapter with path_initial_model_for_weight_conversion"
        )
    for name, value in fields.items():
        if value and name not in _SERVED and name not in _TRAINING_ONLY:
            raise refuse(f"the adapter uses {name}, which is not supported")


def _parse(fields: dict[str, Any]) -> PeftConfig:
    """Raises TypeError, ValueError or KeyError if a field is not what PEFT writes."""
    targets = fields["target_modules"]
    if not targets:
        raise ValueError("target_modules is missing")
    layers, pattern = fields.get("layers_to_transform"), fields.get("layers_pattern")
    if isinstance(layers, int):
        layers = [layers]
    return PeftConfig(
        rank=_positive("r", fields.get("r", 8)),
        alpha=float(fields.get("lora_alpha", 8)),
        use_rslora=bool(fields.get("use_rslora")),
        rank_pattern={
            str(key): _positive("rank_pattern", rank)
            for key, rank in (fields.get("rank_pattern") or {}).items()
        },
        alpha_pattern={
            str(key): float(alpha) for key, alpha in (fields.get("alpha_pattern") or {}).items()
        },
        target_modules=_names("target_modules", targets),
        exclude_modules=_names("exclude_modules", fields.get("exclude_modules") or []),
        layers=[int(layer) for layer in layers] if layers else None,
        layers_pattern=[pattern] if isinstance(pattern, str) else list(pattern or ()),
    )


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}")
    return value


def _names(name: str, value: Any) -> str | list[str]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    raise TypeError(f"{name} must be a string or a list of strings")
