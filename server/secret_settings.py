"""Settings that keep strangers out.

An empty one is a mistake, such as a variable that a script could not fill in, and never means that
no key is wanted.
"""

from __future__ import annotations

import os
from typing import Any

from ..engine.errors import ConfigurationError

_SECRETS = ("api_key", "admin_api_key")
_PREFIX = "quire_"


def check_key(key: str) -> None:
    """Raise ValueError for a key that would let anyone in, or that no client can send."""
    if not key.strip():
        raise ValueError("the key is empty; leave the setting out if no key is wanted")
    if key != key.strip():
        raise ValueError("the key begins or ends with white space, which no header carries")


def refuse_empty_keys(flags: dict[str, Any]) -> None:
    """Raise ConfigurationError if a variable of the environment holds an empty key and no flag in
    `flags` takes its place. (Empty variables leave all other settings at their defaults.)"""
    for variable, value in os.environ.items():
        name = variable.lower().removeprefix(_PREFIX)
        if variable.lower() != _PREFIX + name or name not in _SECRETS or name in flags:
            continue
        try:
            check_key(value)
        except ValueError as error:
            raise ConfigurationError(f"{name}: {error} ({variable})") from error
