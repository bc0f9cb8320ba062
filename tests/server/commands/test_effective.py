"""`--print-config`, and how mistakes are told: by the flag, the variable or the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quire.server import cli
from quire.server.setting_sources import unknown_variables
from quire.server.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"QUIRE_{name.upper()}", raising=False)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["serve", "--print-config", *arguments]) == 0
    return capsys.readouterr().out


def test_it_names_each_source_and_hides_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "quire.yaml"
    file.write_text("max-n: 5\nseed: 3\nadmin-api-key: hush\n")
    monkeypatch.setenv("QUIRE_SEED", "4")
    text = printed(capsys, "org/m", "--config", str(file), "--port", "81", "--api-key", "sesame")
    rows = dict(line.split("  # ") for line in text.splitlines() if "  # " in line)
    sources = {name.strip(): source for name, source in rows.items()}
    assert sources["model: org/m"] == "argument"
    assert sources["port: 81"] == "flag --port"
    assert sources["seed: 4"] == "environment QUIRE_SEED"
    assert sources["max_n: 5"] == f"file {file}"
    assert sources["max_num_seqs: 256"] == "default"
    assert sources["# api_key: hidden"] == "flag --api-key"
    assert sources["# admin_api_key: hidden"] == f"file {file}"
    assert "sesame" not in text and "hush" not in text


@pytest.mark.parametrize("preset", ["cpu", "gpu", None])
def test_what_it_prints_is_accepted_and_means_the_same(
    preset: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--served-model-name", "a", "--served-model-name", "b: #c", "--max-body-bytes", "5MB"]
    flags += ["--lora", "x=/y", "--chat-template", "{{ 'a\nb' }}", "--async-scheduling", "no"]
    if preset is not None:
        flags += ["--config", str(Path(__file__).parents[3] / "configs" / f"{preset}.yaml")]
    text = printed(capsys, *flags)
    file = tmp_path / "again.yaml"
    file.write_text(text)
    settings = load_settings(config=str(file))
    assert settings.served_model_name == ("a", "b: #c") and settings.async_scheduling is False
    assert int(settings.max_body_bytes) == 5_000_000
    again = printed(capsys, "--config", str(file))
    values = [line.split("  # ")[0] for line in text.splitlines()]
    assert [line.split("  # ")[0] for line in again.splitlines()] == values


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "x"], "--port: must be an integer, not 'x'"),
        (["--scheduling-policy", "fifs"], "--scheduling-policy: must be .*did you mean fcfs?"),
        (["--block-size", "17"], "--block-size must be a power of two"),
        (["--config", "/no/such.yaml"], "config: there is no file"),
        (["--require-api-key"], "set QUIRE_API_KEY or give --api-key"),
    ],
)
def test_wrong_flags_exit_with_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("quire: ") and error.count("\n") == 1
    assert all(part in error for part in said.split(".*"))


def test_wrong_variables_and_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "quire.yaml"
    file.write_text("max-num-seqs: many\nmax-num-seq: 1\n")
    monkeypatch.setenv("QUIRE_PORT", "99999")
    assert cli.main(["serve", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert "QUIRE_PORT: must be at most 65535, not '99999'" in error
    assert f"{file}: max_num_seqs: must be an integer, not 'many'" in error
    assert f"{file}: max_num_seq: there is no such setting; " in error
    assert "did you mean --max-num-seqs?" in error


def test_names_in_files_may_have_dashes_but_not_both(tmp_path: Path) -> None:
    file = tmp_path / "quire.yaml"
    file.write_text("max-num-seqs: 3\n")
    assert load_settings(config=str(file)).engine_config().max_num_seqs == 3
    file.write_text("max-num-seqs: 3\nmax_num_seqs: 4\n")
    with pytest.raises(Exception, match="has max_num_seqs twice"):
        load_settings(config=str(file))
    file.write_text("config: other.yaml\n")
    with pytest.raises(Exception, match="cannot name another file"):
        load_settings(config=str(file))


def test_unknown_variables_are_named_but_not_those_of_kubernetes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("QUIRE_MAX_NUM_SEQ", "QUIRE_ZZZ", "QUIRE_PORT_8000_TCP", "QUIRE_SERVICE_HOST"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("QUIRE_SEED", "1")
    found = unknown_variables(Settings.model_fields)
    assert found.pop("QUIRE_ZZZ") == "no setting has this name"
    assert found.pop("QUIRE_MAX_NUM_SEQ") == "did you mean QUIRE_MAX_NUM_SEQS?"
    assert not [name for name in found if "8000" in name or "SERVICE" in name]


def test_the_public_preset_needs_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    preset = str(Path(__file__).parents[3] / "configs" / "public.yaml")
    assert cli.main(["serve", "--config", preset]) == 2
    assert "clients need a key" in capsys.readouterr().err
    printed(capsys, "--config", preset, "--api-key", "k")


# -- the command line ------------------------------------------------------------------------


def test_quire_alone_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in cli.COMMANDS)


@pytest.mark.parametrize(("word", "meant"), [("sevre", "serve"), ("chatt", "chat"), ("zz", "")])
def test_a_mistyped_command(word: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([word])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert (f"did you mean quire {meant}?" if meant else "there are serve, chat") in error


def test_help_fits_80_columns_and_has_no_long_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80, command


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("quire ser", {"serve"}),
        ("quire serve --max-num-s", {"--max-num-seqs"}),
        ("quire serve --device c", {"cpu", "cuda"}),
        ("quire chat smol", {"smollm2"}),
        ("quire completion z", {"zsh"}),
    ],
)
def test_shells_complete(line: str, found: set[str], tmp_path: Path) -> None:
    output = tmp_path / "found"
    output.touch()
    environment = {
        "PATH": "",
        "HOME": str(tmp_path),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(output),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    code = "from quire.server.cli import main; main()"
    subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=tmp_path, check=True, timeout=60
    )
    assert set(output.read_text().split()) == found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_of_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    assert "quire" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from quire.server.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, "serve", "--print-config"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0
