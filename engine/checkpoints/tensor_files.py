"""The tensors of a model's safetensors files: their shapes from the headers, their numbers from
mapped memory when they are asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ModelLoadError, one_line


class StoredTensor(NamedTuple):
    """A tensor in a file. `dtype` is safetensors' name, such as I32 or F8_E4M3."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class TensorFiles:
    """All tensors of a folder or hub repository, by name."""

    def __init__(self, repository: str) -> None:
        """Read the headers. Raises ModelLoadError if a file is missing, cut or broken."""
        from safetensors import SafetensorError, safe_open

        self.repository = repository
        self.tensors: dict[str, StoredTensor] = {}
        self._open: dict[str, Any] = {}
        for file in _weight_files(repository):
            try:
                self._open[file] = safe_open(file, framework="pt")
                names = self._open[file].keys()
                parts = {name: self._open[file].get_slice(name) for name in names}
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(
                    f"cannot read the weights of {repository!r}: {one_line(error)}"
                ) from error
            for name, part in parts.items():
                shape = tuple(part.get_shape())
                self.tensors[name] = StoredTensor(file, str(part.get_dtype()), shape)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, which is a view of the mapped file."""
        tensor: torch.Tensor = self._open[self.tensors[name].file].get_tensor(name)
        return tensor


def _weight_files(repository: str) -> list[str]:
    from transformers.utils import cached_file

    folder = Path(repository).expanduser()
    place = str(folder) if folder.is_dir() else repository
    try:
        index = cached_file(place, "model.safetensors.index.json")
    except OSError:  # the weights are not split
        index = None
    try:
        names = ["model.safetensors"]
        if index is not None:
            weight_map = json.loads(Path(str(index)).read_text("utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        return [str(cached_file(place, name)) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"cannot find the weights of {repository!r}: {one_line(error)}") from (
            error
        )
