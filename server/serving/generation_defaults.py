"""Default sampling parameters from a model's generation_config.json.

The file was written for transformers, often by hand, and nothing checked it. So no value in it
stops the server: one that is out of range is moved to the nearest that is not, one that makes no
sense is left out, and either is logged. What requests themselves ask for is checked strictly.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from transformers.utils import cached_file

from ...engine.errors import ConfigurationError
from ...engine.sampling_params import MAX_REPETITION_PENALTY, MAX_TOP_K, MIN_REPETITION_PENALTY

log = structlog.get_logger(__name__)


class _Range(NamedTuple):
    """The values that a parameter may have. `off` are values that leave it out without a word."""

    low: float
    high: float
    kind: type[int] | type[float]
    off: tuple[float, ...] = ()
    clamped: bool = True
    """A value out of range is moved to the nearest in it, rather than left out."""


_SMALLEST = 1e-6
_RANGES = {
    "temperature": _Range(0.0, 2.0, float),
    "top_p": _Range(_SMALLEST, 1.0, float),
    "top_k": _Range(1, MAX_TOP_K, int, off=(-1, 0), clamped=False),
    "min_p": _Range(0.0, 1.0, float),
    "repetition_penalty": _Range(
        MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY, float, off=(0,), clamped=False
    ),
    "max_new_tokens": _Range(1, math.inf, int, off=(-1, 0), clamped=False),
}
"""Entries of a generation_config.json that are used."""


def load_generation_defaults(
    source: str, model: str | None, packaged: dict[str, float] | None = None
) -> dict[str, Any]:
    """Return the sampling parameters of a generation_config.json.

    `source` is "auto" (the model's own file, if there is one), "none", or a folder or file; `model`
    is a folder or hub id, or None if the model has no such files; `packaged` is what is known of
    such a model instead. Raises ConfigurationError if the file is missing or is not a JSON object.
    """
    if source == "none" or (source == "auto" and model is None):
        return {} if source == "none" else read_defaults(packaged or {})
    try:
        if source == "auto":
            found = cached_file(
                model, "generation_config.json", _raise_exceptions_for_missing_entries=False
            )
            if found is None:
                return {}  # many models have none
            path = Path(found)
        else:
            path = Path(source)
            path = path / "generation_config.json" if path.is_dir() else path
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"generation_config: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"generation_config: {source} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"generation_config: {source} is not a JSON object")
    return read_defaults(config)


def read_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults in the fields of a generation_config.json; other fields are ignored.

    `do_sample: false` makes greedy answers the default, which it also means to transformers; there,
    a file that does not mention it means the same, but here, as in vLLM, it does not.
    """
    defaults: dict[str, Any] = {}
    for name, allowed in _RANGES.items():
        value = config.get(name)
        if value is None:
            continue
        used = _usable(value, allowed)
        if used is not None:
            defaults[name] = used
        if used != value and value not in allowed.off:
            log.warning("generation_config", field=name, value=repr(value)[:64], used=used)
    if config.get("do_sample") is False:
        temperature = defaults.get("temperature")
        defaults["temperature"] = 0.0
        if temperature:
            log.warning("generation_config", field="do_sample", value="False", used="temperature 0")
    return defaults


def _usable(value: Any, allowed: _Range) -> float | int | None:
    """Return `value`, or the nearest value of the range, or None to leave it out."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    nearest = min(max(value, allowed.low), allowed.high)
    if nearest != value and not allowed.clamped:
        return None
    if allowed.kind is int and value != int(value):
        return None
    return int(nearest) if allowed.kind is int else nearest
