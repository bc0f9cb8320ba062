"""The file of --api-keys-file: YAML, a key or its SHA-256 digest for each name, with its limits.

alice: sk-a1b2c3
bob:
  key: sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
  tokens_per_minute: 20000
  models: [quire-demo]
carol:
  key: [sk-old, sk-new]     # both are valid, so that one can take the other's place
  admin: true
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import yaml

from ...engine.errors import ConfigurationError
from ..setting_types import check_key
from .tenant import Limits, Tenant, digest_of, owner_of

MAX_FILE_BYTES = 8 * 1024 * 1024
"""Maximum size of the file."""
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_LIMITS = tuple(field.name for field in msgspec.structs.fields(Limits))
_FIELDS = ("key", "admin", "models", *_LIMITS)


def read_keys_file(path: Path, defaults: Limits) -> list[Tenant]:
    """Return the tenants of the file, in its order; `defaults` are the limits that they do not
    set. Raises ConfigurationError, which never contains a key.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        return _tenants(content, defaults)
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except yaml.MarkedYAMLError as error:
        # The message of YAML's own quotes the line, which holds a key.
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        reason = f"it is not valid YAML{line}"
    except yaml.YAMLError:
        reason = "it is not valid YAML"
    except RecursionError:
        reason = "it is nested too deep"
    except ValueError as error:
        reason = str(error)
    raise ConfigurationError(f"api_keys_file: cannot use {path}: {reason}")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which would take the last of several members of one name."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ValueError(f"{_shown(key.value)} is there twice")
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def _tenants(content: Any, defaults: Limits) -> list[Tenant]:
    if not isinstance(content, dict) or not content:
        raise ValueError("it must hold a mapping from names to keys, with at least one")
    tenants = [_tenant(name, value, defaults) for name, value in content.items()]
    seen: dict[bytes, str] = {}
    for tenant in tenants:
        for digest in tenant.digests:
            other = seen.setdefault(digest, tenant.name)
            if other != tenant.name:
                raise ValueError(f"{other} and {tenant.name} have the same key")
    return tenants


def _tenant(name: Any, value: Any, defaults: Limits) -> Tenant:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{_shown(name)} is not a name: 1 to 64 letters, digits and . _ @ -, in quotes if YAML "
            "takes it for a number"
        )
    fields = value if isinstance(value, dict) else {"key": value}
    for field in fields:
        if field not in _FIELDS:
            known = ", ".join(_FIELDS)
            raise ValueError(f"{name}: {_shown(field)} is not one of {known}")
    is_admin = fields.get("admin", False)
    if not isinstance(is_admin, bool):
        raise ValueError(f"{name}: admin must be true or false")
    # What the flags limit are clients; whoever runs the server is limited only by name.
    standard = Limits() if is_admin else defaults
    return Tenant(
        owner=owner_of(name),
        name=name,
        digests=_digests(name, fields.get("key")),
        is_admin=is_admin,
        limits=Limits(*(_limit(name, field, fields, standard) for field in _LIMITS)),
        models=_models(name, fields.get("models")),
    )


def _digests(name: str, value: Any) -> tuple[bytes, ...]:
    keys = value if isinstance(value, list) else [value]
    if not keys:
        raise ValueError(f"{name}: the key is missing")
    digests = []
    for key in keys:
        if not isinstance(key, str):
            raise ValueError(f"{name}: key must be a text, in quotes if YAML takes it for a number")
        match = _DIGEST.fullmatch(key)
        if match is None and key.startswith("sha256:"):
            raise ValueError(f"{name}: sha256: must be followed by 64 hexadecimal digits")
        try:
            digests.append(bytes.fromhex(match[1]) if match else digest_of(check_key(key)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return tuple(digests)


def _limit(name: str, field: str, fields: dict[str, Any], standard: Limits) -> int | None:
    """Return one limit: that of the flag if the file does not name it, none if it is null."""
    if field not in fields:
        inherited: int | None = getattr(standard, field)
        return inherited
    value = fields[field]
    if value is not None and (type(value) is not int or not 1 <= value <= 10**12):
        raise ValueError(f"{name}: {field} must be a whole number from 1 on, or null for no limit")
    return value


def _models(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name}: models must be a list of names")
    return tuple(value)


def _shown(value: Any) -> str:
    """Return what stands in the place of a name. It might be a key, so only its beginning."""
    text = ascii(value)
    return text if len(text) <= 20 else f"{text[:8]}…"
