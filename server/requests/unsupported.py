"""Refuses fields of the API that quire knows but does not support, by name: they are never ignored.

A value that asks for nothing (`"modalities": ["text"]`) is accepted and dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...engine.errors import InvalidRequestError

_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structural_tag": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "thinking_token_budget": (),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""The unsupported fields, each with the values that ask for nothing. null always does."""


def refuse_unsupported(
    fields: dict[str, Any], asks_for_nothing: Mapping[str, tuple[Any, ...]] = _ASKS_FOR_NOTHING
) -> dict[str, Any]:
    """Return `fields` without the unsupported ones. Raises InvalidRequestError if one of them asks
    for something."""
    for name in fields.keys() & asks_for_nothing.keys():
        value = fields[name]
        harmless = (None, *asks_for_nothing[name])
        if not any(type(value) is type(other) and value == other for other in harmless):
            raise InvalidRequestError(f"{name} is not supported by this server", name)
    return {name: value for name, value in fields.items() if name not in asks_for_nothing}
