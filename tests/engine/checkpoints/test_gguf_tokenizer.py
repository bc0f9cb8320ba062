"""Test that a GGUF file's tokenizer is the one that transformers reads from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quire.engine.checkpoints import gguf_tokenizer
from quire.engine.checkpoints.gguf_tokenizer import tokenizer_folder, translate_tokenizer
from quire.engine.errors import ModelLoadError

from .gguf_files import write_model

TEXT = "hello he <|end|> x\nhe!"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_model(path, "llama-tied")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quire" / "gguf"


def test_ids_template_and_ends_are_those_of_transformers(file: Path, cache: Path) -> None:
    folder = translate_tokenizer(file)
    assert folder.parent == cache
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (TEXT, "", " he", "<s>he"):
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours(TEXT).input_ids[0] == ours.bos_token_id == 1
    assert 2 in ours(TEXT).input_ids and 3 in ours(TEXT).input_ids
    assert ours.chat_template == theirs.chat_template is not None
    assert (ours.eos_token, ours.pad_token, ours.unk_token) == ("<|end|>", "<pad>", None)


def test_it_is_translated_once_and_again_if_the_file_changes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copy(file, copy)
    folder = tokenizer_folder(str(tmp_path), "copy.gguf")
    monkeypatch.setattr(gguf_tokenizer, "_convert", None)
    assert tokenizer_folder(str(copy)) == folder
    copy.touch()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tokenizer_folder(str(copy)) != folder


def test_old_folders_are_removed(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_tokenizer, "_MAX_KEPT", 2)
    for name in ("a", "b", "c"):
        (cache / name).mkdir(parents=True)
    folder = translate_tokenizer(file)
    assert folder.exists() and len(list(cache.iterdir())) == 2


def test_a_home_that_is_not_writable_gives_a_folder_of_the_process(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    folder = translate_tokenizer(file)
    assert tmp_path not in folder.parents and (folder / "tokenizer.json").exists()
    assert translate_tokenizer(file) == folder


def test_no_torch_is_imported(file: Path) -> None:
    code = (
        "import sys; from quire.server.text.torch_free import import_transformers;"
        "import_transformers();"
        "from quire.engine.checkpoints.gguf_tokenizer import tokenizer_folder;"
        "tokenizer_folder(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(file)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz", "no tokenizer"),
        (b"tokenizer.ggml.eos_token_id\x04\0\0\0\x02\0", None, "eos_token_id is 65281"),
        (b"h e", b"hqe", "cannot read the tokenizer"),
    ],
)
def test_a_broken_vocabulary_is_refused(
    file: Path, tmp_path: Path, old: bytes, new: bytes | None, reason: str
) -> None:
    content = file.read_bytes()
    assert old in content
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content.replace(old, new or old[:-2] + b"\x01\xff"))
    with pytest.raises(ModelLoadError, match=reason):
        translate_tokenizer(broken)
