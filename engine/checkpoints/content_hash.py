"""A hash that tells one model's files from another's without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ..config import EngineConfig
from ..errors import ModelLoadError, one_line
from .source import source_of

NUM_SAMPLES = 64
"""Samples of a large file, at equal distances from its beginning to its end."""
SAMPLE_BYTES = 4096
WHOLE_BYTES = NUM_SAMPLES * SAMPLE_BYTES
"""Size up to which a file is hashed as a whole."""


def files_hash(files: Iterable[Path]) -> str:
    """Return a hash of the files' names, sizes and samples, as 32 hexadecimal digits.

    It is the same on all machines that have the same files. Of large files only samples count,
    the beginning and the end among them: weights that were trained again differ in those, as they
    differ nearly everywhere, and hashing tens of gigabytes would take as long as loading them.
    Raises OSError.
    """
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
                continue
            for index in range(NUM_SAMPLES):
                file.seek((size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def model_hash(config: EngineConfig) -> str:
    """Return a hash of the configured model's configuration and weights. Raises ModelLoadError."""
    source = source_of(config)
    try:
        if source.gguf is not None:
            return files_hash([source.gguf])
        assert source.repository is not None
        folder = _folder_of(source.repository)
        if config.load_format == "dummy":
            return f"{files_hash([folder / 'config.json'])}-dummy-{config.seed}"
        return files_hash([folder / "config.json", *folder.glob("*.safetensors")])
    except OSError as error:
        raise ModelLoadError(f"cannot read the model's files: {one_line(error)}") from error


def _folder_of(repository: str) -> Path:
    """Return the folder of a model, which a hub repository has in the cache once it is loaded."""
    folder = Path(repository).expanduser()
    if folder.is_dir():
        return folder
    from transformers.utils import cached_file

    return Path(str(cached_file(repository, "config.json"))).parent
