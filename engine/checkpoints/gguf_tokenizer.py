"""The tokenizer of a GGUF file as a folder that AutoTokenizer can load.

A GGUF file spells its vocabulary out in metadata. transformers turns that into a tokenizer, which
takes seconds for a large vocabulary; so the result is kept in the user's cache, and every process
reads it from there. No torch is needed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ModelLoadError, QuireError, UnsupportedModelError, one_line
from .gguf_header import Header, read_header
from .source import find_source

logger = logging.getLogger("quire.engine")

_FORMAT = 1
"""Number of the form of kept folders; it changes with this file's rules."""
_MAX_KEPT = 32
"""Folders that the cache keeps; the oldest are removed."""
_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_FOR_CONVERTER = {
    "ggml.model": "tokenizer_type",
    "ggml.pre": "pre_tokenizer_type",
    "ggml.tokens": "tokens",
    "ggml.scores": "scores",
    "ggml.token_type": "token_type",
    "ggml.merges": "merges",
    "ggml.precompiled_charsmap": "precompiled_charsmap",
    "ggml.bos_token_id": "bos_token_id",
    "ggml.eos_token_id": "eos_token_id",
    "ggml.unknown_token_id": "unk_token_id",
    "ggml.padding_token_id": "pad_token_id",
    "ggml.add_space_prefix": "add_prefix_space",
}
"""Metadata below "tokenizer." under the names by which transformers' converter takes it."""
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_folder(model: str, gguf_file: str | None = None) -> str:
    """Return a folder or hub id that AutoTokenizer can load, for a model as `find_source` takes
    it. Raises ModelLoadError, UnsupportedModelError."""
    source = find_source(model, gguf_file)
    if source.gguf is not None:
        return str(translate_tokenizer(source.gguf))
    assert source.repository is not None  # a source has one or the other
    return source.repository


def translate_tokenizer(file: Path) -> Path:
    """Return a folder with the tokenizer and the chat template of a GGUF file.

    Raises ModelLoadError if the file or its tokenizer cannot be read, UnsupportedModelError if
    the package gguf is missing.
    """
    kept = _cache_folder()
    folder = kept / _key(file)
    if (folder / "tokenizer.json").exists():
        folder.touch()
        return folder
    header = read_header(file, (_TOKENS, _MERGES))
    made = Path(tempfile.mkdtemp(dir=kept, prefix="."))
    try:
        _convert(header).save_pretrained(made)
        made.chmod(0o755)
        made.rename(folder)
    except QuireError:
        raise
    except Exception as error:  # whatever a broken vocabulary makes the converter raise
        if (folder / "tokenizer.json").exists():  # another process was faster
            return folder
        raise ModelLoadError(f"cannot read the tokenizer of {file}: {one_line(error)}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    _remove_oldest(kept)
    return folder


def _convert(header: Header) -> Any:
    """Return the file's tokenizer as an object of transformers."""
    from transformers import PreTrainedTokenizerFast

    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
    except ImportError as error:
        raise UnsupportedModelError(
            "a GGUF file needs a newer transformers, such as 5.23"
        ) from error

    metadata = header.metadata
    tokens = metadata.get(_TOKENS)
    if not isinstance(tokens, list) or not tokens:
        header.refuse("it has no tokenizer")
    values = {
        name: _plain(metadata[f"tokenizer.{key}"])
        for key, name in _FOR_CONVERTER.items()
        if f"tokenizer.{key}" in metadata
    }
    backend, settings = convert_gguf_tokenizer(header.architecture, values)
    for name, key in _SPECIAL.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and not 0 <= token_id < len(tokens):
            header.refuse(f"tokenizer.ggml.{key}_token_id is {token_id}, not one of its tokens")
        settings[f"{name}_token"] = None if token_id is None else tokens[token_id]
    # Older files don't say whether a text begins with a BOS; with SentencePiece it does.
    begins = metadata.get("tokenizer.ggml.add_bos_token", values["tokenizer_type"] == "llama")
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=bool(begins) and settings["bos_token"] is not None,
        add_eos_token=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=template if isinstance(template, str) else None,
        **settings,
    )


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _key(file: Path) -> str:
    """Return the folder's name, which changes with the file and with the converter."""
    from importlib.metadata import version

    status = file.stat()
    parts = (file.resolve(), status.st_size, status.st_mtime_ns, version("transformers"), _FORMAT)
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def _cache_folder() -> Path:
    """Return the folder of kept tokenizers, or one of this process if the home is not writable."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "quire" / "gguf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError as error:
        logger.info("tokenizers of GGUF files are not kept: %s", one_line(error))
    return Path(_temporary_folder().name)


@cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="quire-gguf-")


def _remove_oldest(kept: Path) -> None:
    folders = [path for path in kept.iterdir() if not path.name.startswith(".")]
    for path in sorted(folders, key=lambda path: path.stat().st_mtime)[:-_MAX_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
