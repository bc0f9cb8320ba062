"""Whether a model is there is known within seconds, and said in one line."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from quire.engine.checkpoints import hub
from quire.engine.errors import ModelLoadError

KNOWN = ("smollm2",)
ANSWERS = {
    "/org/here/resolve/main/config.json": (307, ""),
    "/org/gated/resolve/main/config.json": (403, "GatedRepo"),
    "/org/bare/resolve/main/config.json": (404, "EntryNotFound"),
    "/org/broken/resolve/main/config.json": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    tokens: list[str | None] = []

    def do_HEAD(self) -> None:
        status, code = ANSWERS.get(self.path, (401, "RepoNotFound"))
        self.tokens.append(self.headers.get("authorization"))
        self.send_response(status)
        if code:
            self.send_header("x-error-code", code)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (hub.OFFLINE, "HF_HOME", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        yield
        server.shutdown()
        thread.join()


@pytest.fixture
def out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def add(cache: Path, model: str, file: str) -> None:
    folder = cache / f"models--{model.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / file).write_text("{}")


def refusal(model: str) -> str:
    with pytest.raises(ModelLoadError) as caught:
        hub.check_repository(model, KNOWN)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_folders(tmp_path: Path, out_of_reach: None) -> None:
    empty, full = tmp_path / "empty", tmp_path / "outer" / "model"
    empty.mkdir()
    full.mkdir(parents=True)
    (full / "config.json").write_text("{}")
    hub.check_repository(str(full), KNOWN)
    assert "is empty" in refusal(str(empty))
    assert f"has no config.json; did you mean {full}?" in refusal(str(full.parent))
    assert f"did you mean {full}?" in refusal(str(full.parent / "modle"))
    assert "is a file" in refusal(str(full / "config.json"))
    assert "there is no folder a/b/c" in refusal("a/b/c")


def test_a_folder_needs_a_tokenizer_and_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="has no tokenizer"):
        hub.check_folder_files(tmp_path, weights=False)
    (tmp_path / "tokenizer.json").write_text("{}")
    hub.check_folder_files(tmp_path, weights=False)
    with pytest.raises(ModelLoadError, match="has no weights"):
        hub.check_folder_files(tmp_path, weights=True)
    (tmp_path / "model-00001-of-00002.safetensors").write_text("")
    hub.check_folder_files(tmp_path, weights=True)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/gated", "gated: accept its terms"),
        ("org/bare", "has no config.json"),
        ("org/broken", "answers 500"),
        ("org/none", "no such model on the hub, or HF_TOKEN must be set"),
        ("smolm2", "did you mean smollm2?"),
    ],
)
def test_refusals_of_the_hub(model: str, message: str, reachable: None) -> None:
    assert message in refusal(model)


def test_a_model_on_the_hub_passes_and_the_token_is_sent(
    reachable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.check_repository("org/here", KNOWN)
    assert Hub.tokens[-1] == "Bearer secret" and not hub.is_offline()


def test_a_hub_out_of_reach(empty_cache: Path, out_of_reach: None) -> None:
    assert "out of reach" in refusal("org/here")
    add(empty_cache, "org/here", "config.json")
    try:
        hub.check_repository("org/here", KNOWN)
        assert hub.is_offline()  # the libraries need not find out again
        assert "did you mean org/here?" in refusal("org/heer")
    finally:
        del os.environ[hub.OFFLINE]


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT", 0.05)
    monkeypatch.setattr(hub, "_head", lambda *_: time.sleep(0.5))
    began = time.monotonic()
    assert "no answer in" in refusal("org/here")
    assert time.monotonic() - began < 0.4


def test_cached_models_are_those_with_a_configuration(empty_cache: Path) -> None:
    assert hub.cached_models() == []
    add(empty_cache, "a/b", "config.json")
    add(empty_cache, "a/c", "x.gguf")
    assert hub.cached_models() == ["a/b"]
