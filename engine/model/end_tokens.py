"""The tokens that end a sequence, from all files of a model that name them.

Fine-tunes often change one of the files and leave the others: the tokenizer ends turns at
"<|im_end|>" while config.json still has the base model's end of text. What any of them names ends a
sequence, so that no answer runs on after the model has ended it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..checkpoints.source import source_of
from ..config import EngineConfig
from ..errors import ModelLoadError, one_line

logger = logging.getLogger("quire.engine")


def read_end_tokens(hf_config: Any, config: EngineConfig, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end a sequence: those of config.json, of generation_config.json and of
    the tokenizer.

    What is no id of the vocabulary is left out, with a warning. Raises ModelLoadError if a file
    cannot be read.
    """
    text = hf_config.get_text_config(decoder=True)
    sources = {
        "config.json": [
            getattr(hf_config, "eos_token_id", None),
            getattr(text, "eos_token_id", None),
        ],
        "generation_config.json": [
            _read_object(config, "generation_config.json").get("eos_token_id")
        ],
        "the tokenizer": [_tokenizer_end(config)],
    }
    found: set[int] = set()
    for name, values in sources.items():
        for value in values:
            for token in value if isinstance(value, list | tuple) else [value]:
                if type(token) is int and 0 <= token < vocab_size:
                    found.add(token)
                elif token is not None:
                    logger.warning(
                        "%s names the end token %r, which is no id of the vocabulary of %d; it is "
                        "ignored",
                        name,
                        token,
                        vocab_size,
                    )
    return tuple(sorted(found))


def _tokenizer_end(config: EngineConfig) -> int | None:
    """Return the id of the tokenizer's end token, or None if its files do not tell it."""
    fields = _read_object(config, "tokenizer_config.json")
    token = fields.get("eos_token") or _read_object(config, "special_tokens_map.json").get(
        "eos_token"
    )
    spelling = token.get("content") if isinstance(token, dict) else token
    if not isinstance(spelling, str):
        return None
    decoder = fields.get("added_tokens_decoder")
    added = [
        {**entry, "id": int(key)}
        for key, entry in (decoder.items() if isinstance(decoder, dict) else ())
        if isinstance(entry, dict) and key.isdecimal()
    ]
    for entry in added or _added_tokens(config):
        if isinstance(entry, dict) and entry.get("content") == spelling:
            token_id: int | None = entry.get("id")
            return token_id
    return None


def _added_tokens(config: EngineConfig) -> list[Any]:
    """Return the added tokens of tokenizer.json. Only this list is decoded: it stands before the
    vocabulary, which may have tens of megabytes."""
    text = _read_text(config, "tokenizer.json") or ""
    _, key, rest = text.partition('"added_tokens"')
    if not key:
        return []
    try:
        entries, _ = json.JSONDecoder().raw_decode(rest.lstrip(" \t\r\n:"))
    except ValueError as error:
        raise _unreadable(config, "tokenizer.json", error) from error
    return entries if isinstance(entries, list) else []


def _read_object(config: EngineConfig, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the model; {} if there is no such file."""
    text = _read_text(config, name)
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise _unreadable(config, name, error) from error
    if not isinstance(fields, dict):
        raise _unreadable(config, name, TypeError("it is not a JSON object"))
    return fields


def _read_text(config: EngineConfig, name: str) -> str | None:
    """Return the text of a file of the model, or None if there is no such file."""
    from transformers.utils import cached_file

    folder = source_of(config).repository
    if folder is None:
        return None  # a GGUF file names its end tokens itself
    try:
        # Each file is optional, so one that the hub does not deliver is as good as none.
        path = cached_file(
            folder,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unreadable(config, name, error) from error


def _unreadable(config: EngineConfig, name: str, error: Exception) -> ModelLoadError:
    return ModelLoadError(f"cannot read {name} of {config.model!r}: {one_line(error)}")
