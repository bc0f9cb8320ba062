"""Where the settings of `quire serve` come from: flags, the environment, a YAML file, defaults.

It reads the file and the names in the environment, finds the source of each value, and describes
mistakes in the words of the place where they were made: `--port`, `QUIRE_PORT`, `FILE: port`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..engine.errors import ConfigurationError
from .foreign_flags import explain
from .setting_types import SECRETS
from .validation import reason_of

PREFIX = "QUIRE_"
Kind = Literal["flag", "environment", "file", "default"]

_SERVICE_LINK = re.compile(r"QUIRE_(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_\w+)")
"""Variables that Kubernetes sets for Services whose names begin with `quire`."""
_OTHER_VARIABLES = frozenset({"QUIRE_FUZZ_EXAMPLES", "QUIRE_GPU_PORT"})
"""Variables of the tests and of docker-compose.yml, which are not the server's."""


def option_of(name: str) -> str:
    """Return the flag of a setting; the model is an argument."""
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Origins:
    """Which of the sources gives each setting. Names have underscores.

    `environment` has the variables by the names of their settings.
    """

    flags: frozenset[str]
    environment: Mapping[str, str]
    file: Path | None
    in_file: frozenset[str]

    def kind(self, name: str) -> Kind:
        """Return the strongest source that has the setting."""
        if name in self.flags:
            return "flag"
        if name in self.environment:
            return "environment"
        return "file" if name in self.in_file else "default"

    def label(self, name: str) -> str:
        """Return the setting as it is spelt in its source, such as QUIRE_PORT."""
        match self.kind(name):
            case "environment":
                return self.environment[name]
            case "file":
                return f"{self.file}: {name}"
        return option_of(name)

    def describe(self, item: Mapping[str, Any], known: Iterable[str], *, as_flags: bool) -> str:
        """Return one of pydantic's errors about the settings, of which `known` are all names.

        `as_flags` says whether what is no other source's is spelt as a flag or as a name.
        """
        name = str(item["loc"][0]) if item["loc"] else ""
        if item["type"] == "extra_forbidden":
            advice = explain(option_of(name), [option_of(field) for field in known])
            place = f"{self.file}: " if name in self.in_file and name not in self.flags else ""
            return f"{place}{name}: there is no such setting; {advice}"
        if not name:
            return str(item["msg"]).removeprefix("Value error, ")
        given = item.get("input")
        is_told = name not in SECRETS and item["type"] != "value_error"
        said = f", not {given!r}" if is_told and isinstance(given, str | int | float) else ""
        label = self.label(name) if as_flags or self.kind(name) != "flag" else name
        return f"{label}: {reason_of(item)}{said}{_nearest_choice(item)}"


def origins_of(flags: Mapping[str, Any], names: Iterable[str]) -> Origins:
    """Return the sources of the settings `names`; `flags` are those on the command line.

    Raises ConfigurationError if the file that a flag or the environment names cannot be read.
    """
    variables = {variable.upper(): variable for variable, value in os.environ.items() if value}
    spelt = {name: PREFIX + name.upper() for name in names}
    environment = {name: variables[upper] for name, upper in spelt.items() if upper in variables}
    path = flags.get("config") or os.environ.get(environment.get("config", ""))
    file = None if path is None else Path(path)
    keys = frozenset[str]() if file is None else frozenset(read_file(file))
    return Origins(frozenset(flags), environment, file, keys)


def read_file(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML file by name. Dashes in names count as underscores.

    Raises ConfigurationError if there is no such file or if it holds anything but settings.
    """
    if not path.is_file():
        raise ConfigurationError(f"config: there is no file {path}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"config: cannot read {path}: {reason}") from error
    if found is None:  # a file of comments only
        return {}
    if not isinstance(found, dict):
        raise ConfigurationError(f"config: cannot read {path}: it is not a list of `name: value`")
    settings: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name in settings:
            raise ConfigurationError(f"config: {path} has {name} twice, with - and with _")
        if name == "config":
            raise ConfigurationError(f"config: {path} cannot name another file")
        settings[name] = value
    return settings


def unknown_variables(names: Iterable[str]) -> dict[str, str]:
    """Return the variables QUIRE_… of the environment that are no settings, and advice on each."""
    known = [PREFIX + name.upper() for name in names]
    found = {}
    for variable in sorted(os.environ):
        upper = variable.upper()
        if not upper.startswith(PREFIX) or upper in known or upper in _OTHER_VARIABLES:
            continue
        if _SERVICE_LINK.fullmatch(upper):
            continue
        close = difflib.get_close_matches(upper, known, 1, cutoff=0.75)
        found[variable] = f"did you mean {close[0]}?" if close else "no setting has this name"
    return found


def _nearest_choice(item: Mapping[str, Any]) -> str:
    """Return a hint at the choice that is most like the given value."""
    given = item.get("input")
    if item["type"] != "literal_error" or not isinstance(given, str):
        return ""
    choices = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
    close = difflib.get_close_matches(given, choices, 1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
