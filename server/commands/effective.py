"""`quire serve --print-config`: every setting, its value, and where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ByteSize

from ..setting_sources import Origins, option_of
from ..setting_types import SECRETS
from ..settings import GROUPS, Settings

_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def effective(settings: Settings, origins: Origins) -> str:
    """Return the settings as YAML that `--config` accepts, each with its source in a comment.

    Keys are not shown: a comment stands in their place.
    """
    lines = ["# The effective settings of `quire serve`. Keys are left out: set them beside this."]
    lines += _lines(["model"], settings, origins)
    for group in GROUPS:
        lines += ["", f"# {group}"]
        lines += _lines(names_of(group), settings, origins)
    return "\n".join(lines)


def names_of(group: str) -> list[str]:
    """Return the settings that are listed under a group."""
    found = []
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra["group"] == group:
            found.append(name)
    return found


def _lines(names: list[str], settings: Settings, origins: Origins) -> list[str]:
    lines = []
    for name in names:
        value = getattr(settings, name)
        source = _source(name, origins)
        if name not in SECRETS:
            lines.append(f"{name}: {_yaml(value)}".ljust(44) + f"  # {source}")
        elif value:
            lines.append(f"# {name}: hidden".ljust(44) + f"  # {source}")
        else:
            lines.append(f"# {name}: none".ljust(44) + f"  # {source}")
    return lines


def _source(name: str, origins: Origins) -> str:
    match origins.kind(name):
        case "flag":
            return f"flag {option_of(name)}" if name != "model" else "argument"
        case "environment":
            return f"environment {origins.environment[name]}"
        case "file":
            return f"file {origins.file}"
    return "default"


def _yaml(value: Any) -> str:
    """Return a value on one line of YAML."""
    if isinstance(value, ByteSize):
        value = next(
            (f"{value // size}{unit}" for unit, size in _UNITS if value and value % size == 0),
            int(value),
        )
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.strip().removesuffix("...").strip()
