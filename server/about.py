"""The name and version of this distribution, and how its extras are installed."""

from __future__ import annotations

from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution

DISTRIBUTION = "quire-server"
"""The name that pip installs. The package and the command are `quire`; another project owns that
name on PyPI."""
_FORMER_NAMES = ("quire",)
"""Names of this distribution in environments that were made before it had its name."""
UNKNOWN_VERSION = "0+unknown"
"""The version of sources that run without being installed."""


@cache
def quire_version() -> str:
    """Return the version of the installed distribution, or UNKNOWN_VERSION if there is none."""
    for name in (DISTRIBUTION, *_FORMER_NAMES):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if name == DISTRIBUTION or _is_ours(found):
            return found.version
    return UNKNOWN_VERSION


def install_extra(extra: str) -> str:
    """Return the command that installs an extra, such as "gguf"."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def _is_ours(found: Distribution) -> bool:
    """Return whether a distribution installs our command, rather than being another project."""
    return any(entry.value.startswith("quire.server.") for entry in found.entry_points)
