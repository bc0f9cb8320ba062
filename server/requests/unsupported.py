"""Fields of the API that quire knows and does not support.

Those that would change the meaning of an answer are refused by name. Hints are accepted without
effect, and the answer names them in a header: an answer without them is as good. A value of either
that asks for nothing (`"modalities": ["text"]`) is accepted and dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...engine.errors import InvalidRequestError

_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structural_tag": (),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
"""The unsupported fields, each with the values that ask for nothing. null always does."""

_HINTS: dict[str, tuple[Any, ...]] = {
    "metadata": ({},),
    "prompt_cache_key": (),
    "prompt_cache_retention": ("in_memory",),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
}
"""The fields that are only hints, each with the values that ask for nothing."""


def refuse_unsupported(
    fields: dict[str, Any], asks_for_nothing: Mapping[str, tuple[Any, ...]] = _ASKS_FOR_NOTHING
) -> dict[str, Any]:
    """Return `fields` without the unsupported ones. Raises InvalidRequestError naming those that
    ask for something, if there are any."""
    refused = [
        name
        for name, harmless in asks_for_nothing.items()
        if name in fields and _asks_for_something(fields[name], harmless)
    ]
    if refused:
        verb = "is" if len(refused) == 1 else "are"
        names = ", ".join(refused)
        raise InvalidRequestError(f"{names} {verb} not supported by this server", refused[0])
    return {name: value for name, value in fields.items() if name not in asks_for_nothing}


def take_hints(fields: dict[str, Any], *, strict: bool) -> tuple[dict[str, Any], list[str]]:
    """Return `fields` without the hints, and the names of the hints that ask for something. Raises
    InvalidRequestError for those if `strict`."""
    names = [
        name
        for name, harmless in _HINTS.items()
        if name in fields and _asks_for_something(fields[name], harmless)
    ]
    if strict:
        refuse_ignored(names)
    return {name: value for name, value in fields.items() if name not in _HINTS}, names


def refuse_ignored(names: Sequence[str]) -> None:
    """Raise InvalidRequestError for fields without effect, if there are any: for strict servers."""
    if names:
        have = "has" if len(names) == 1 else "have"
        raise InvalidRequestError(f"{', '.join(names)} {have} no effect on this server", names[0])


def _asks_for_something(value: Any, harmless: tuple[Any, ...]) -> bool:
    return not any(type(value) is type(other) and value == other for other in (None, *harmless))
