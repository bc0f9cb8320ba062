"""Whether a model's folder or hub repository is there, before anything asks for its files.

The hub's own library tries again and again when the hub is out of reach, file by file, in every
process. So one request with a short timeout comes first, and what it finds is said in one line.
huggingface_hub is not imported here: it reads HF_HUB_OFFLINE only once.
"""

from __future__ import annotations

import difflib
import os
import re
import threading
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from ..errors import ModelLoadError

TIMEOUT = 4.0
"""Seconds that the hub has to answer."""
OFFLINE = "HF_HUB_OFFLINE"
"""The variable by which huggingface_hub asks only its local cache."""
_TOKENIZERS = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges", "tekken")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class _Answer(NamedTuple):
    """The hub's answer: its status and the code of its error, or why there is none."""

    status: int | None
    code: str = ""
    reason: str = ""


def hub_cache() -> Path:
    """Return the folder of the hub's local cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(named or home / "hub").expanduser()


def cached_models() -> list[str]:
    """Return the ids of the repositories in the local cache that have a config.json."""
    folder = hub_cache()
    names = [path.name for path in folder.glob("models--*")] if folder.is_dir() else []
    ids = (name.removeprefix("models--").replace("--", "/", 1) for name in sorted(names))
    return [name for name in ids if is_cached(name, "config.json")]


def is_cached(model: str, file: str) -> bool:
    """Return whether a file of a repository's main branch is in the local cache."""
    folder = hub_cache() / f"models--{model.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return False
    return (folder / "snapshots" / revision / file).is_file()


def is_offline() -> bool:
    """Return whether the hub must not be asked."""
    return os.environ.get(OFFLINE, "").lower() in ("1", "true", "yes", "on")


def check_repository(model: str, known: tuple[str, ...], file: str = "config.json") -> None:
    """Raise ModelLoadError if `model` is no folder and no hub repository with the file.

    `known` are names that may have been meant. If the hub is out of reach but the file is in the
    local cache, HF_HUB_OFFLINE is set for this process and those that it starts.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / file).is_file():
            raise ModelLoadError(_without_file(path, file))
        return
    if path.exists():
        raise ModelLoadError(f"{model} is a file: give the folder of a model, or a *.gguf file")
    if not _HUB_ID.fullmatch(model) or model.count("/") > 1:
        raise ModelLoadError(f"there is no folder {model}{_meant(model, _siblings(path))}")
    names = (*known, *cached_models())
    if is_offline():
        if not is_cached(model, file):
            raise ModelLoadError(
                f"there is no folder {model}, and the hub's local cache has none of this name, "
                f"which alone is asked since {OFFLINE} is set{_meant(model, names)}"
            )
        return
    answer = _ask(model, file)
    if answer.status is None:
        if not is_cached(model, file):
            raise ModelLoadError(
                f"there is no folder {model}, and {_endpoint()} is out of reach "
                f"({answer.reason}): check the network or HF_ENDPOINT, or give a folder or a "
                f"*.gguf file{_meant(model, names)}"
            )
        os.environ[OFFLINE] = "1"
        return
    if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR and is_cached(model, file):
        os.environ[OFFLINE] = "1"
    elif answer.status >= HTTPStatus.BAD_REQUEST:
        raise ModelLoadError(_refused(model, file, answer) + _meant(model, names))


def check_folder_files(folder: Path, *, weights: bool) -> None:
    """Raise ModelLoadError if a model's folder has no tokenizer, or no weights if these are asked
    for. (Pickled weights are refused later, by name.)"""
    names = [path.name.lower() for path in folder.iterdir()]
    if not any(name.startswith(_TOKENIZERS) for name in names):
        raise ModelLoadError(f"the folder {folder} has no tokenizer, such as tokenizer.json")
    if weights and not any(name.endswith(_WEIGHTS) for name in names):
        raise ModelLoadError(f"the folder {folder} has no weights, such as model.safetensors")


def _refused(model: str, file: str, answer: _Answer) -> str:
    """Return why the hub does not give a file."""
    if answer.code == "EntryNotFound":
        return f"{model} on the hub has no {file}, so it is no model that can be served"
    if answer.code == "GatedRepo":
        return f"{model} is gated: accept its terms at {_endpoint()}/{model}, and set HF_TOKEN"
    if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND):
        return f"there is no folder {model}, and no such model on the hub, or HF_TOKEN must be set"
    return f"the hub answers {answer.status} for {model}: try again later, or give a folder"


def _without_file(folder: Path, file: str) -> str:
    """Return what is wrong with a folder."""
    if not any(folder.iterdir()):
        return f"the folder {folder} is empty: a model has config.json, weights and a tokenizer"
    below = [each.parent.name for each in sorted(folder.glob(f"*/{file}"))]
    hint = f"; did you mean {folder / below[0]}?" if below else ""
    return f"the folder {folder} has no {file}{hint}"


def _siblings(path: Path) -> tuple[str, ...]:
    """Return the paths beside one that does not exist."""
    try:
        return tuple(str(each) for each in path.parent.iterdir())
    except OSError:
        return ()


def _meant(model: str, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(Path(model).expanduser()), names, 1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _token() -> str | None:
    """Return the token that huggingface_hub would send."""
    if token := os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("HF_TOKEN_PATH") or hub_cache().parent / "token")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _ask(model: str, file: str) -> _Answer:
    """Ask the hub for the head of a file. A name that cannot be resolved may block for longer than
    any timeout, so this waits for a thread."""
    found: list[_Answer] = []
    thread = threading.Thread(target=lambda: found.append(_head(model, file)), daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return found[0] if found else _Answer(None, reason=f"no answer in {TIMEOUT:.0f} s")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The hub answers with the place of a large file; that it has one is enough."""

    def redirect_request(self, *_: object) -> None:
        return None


def _head(model: str, file: str) -> _Answer:
    request = urllib.request.Request(f"{_endpoint()}/{model}/resolve/main/{file}", method="HEAD")
    if token := _token():
        request.add_unredirected_header("authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT) as response:
            return _Answer(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return _Answer(error.code, error.headers.get("x-error-code") or "")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return _Answer(None, reason=str(reason))
