"""How a field of `EngineConfig` is declared as a flag: with its help, bounds and name."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ..errors import ConfigurationError

FlagGroup = Literal["Model", "KV cache", "Scheduling", "Parallelism", "Limits"]
"""Headings under which `quire serve --help` lists the flags."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlag:
    """One user-settable field of `EngineConfig`.

    The value is stored in `field` and set by the flag `name` (with underscores; the command line
    writes dashes). `help` is shown by `--help` and `details` only by docs/api.md, after the help.
    `type` is the field's type at run time. With `is_size` users may write a unit, such as 2GiB.
    """

    field: str
    name: str
    type: Any
    default: Any
    group: FlagGroup
    help: str
    details: str
    ge: float | None
    gt: float | None
    le: float | None
    is_size: bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal type; empty for any other type."""
        inner = self.value_type
        return get_args(inner) if get_origin(inner) is Literal else ()

    @property
    def value_type(self) -> Any:
        """`type` without its None."""
        if get_origin(self.type) not in (Union, UnionType):
            return self.type
        (inner,) = (part for part in get_args(self.type) if part is not type(None))
        return inner

    @property
    def bounds(self) -> str:
        """The bounds in words, such as "above 0 and at most 1"; empty if there are none."""
        parts = (("at least", self.ge), ("above", self.gt), ("at most", self.le))
        return " and ".join(f"{words} {bound}" for words, bound in parts if bound is not None)

    def check(self, value: Any) -> None:
        """Raise ConfigurationError if the field may not have this value."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise ConfigurationError(
                f"unknown {self.field.replace('_', ' ')} {value!r}: "
                f"choose from {', '.join(self.choices)}"
            )
        if (
            (self.ge is not None and not value >= self.ge)
            or (self.gt is not None and not value > self.gt)
            or (self.le is not None and not value <= self.le)
        ):
            raise ConfigurationError(f"{self.field} must be {self.bounds}")


def flag(
    group: FlagGroup,
    help: str,
    default: _T,
    *,
    details: str = "",
    name: str | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    is_size: bool = False,
) -> _T:
    """Declare a field of `EngineConfig` as a flag; see `EngineFlag`. `name` is the field's own name
    unless given. The bounds are named as in pydantic: `ge` is at least, `gt` above, `le` at most.
    """
    declared: dict[str, Any] = {
        "group": group,
        "help": help,
        "details": details,
        "name": name,
        "ge": ge,
        "gt": gt,
        "le": le,
        "is_size": is_size,
    }
    declaration: _T = field(default=default, metadata=declared)
    return declaration
