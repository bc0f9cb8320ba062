"""Test the flags of `quire deploy`, what it refuses, and the configuration that it prints."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from quire.engine.errors import ConfigurationError
from quire.server import cli
from quire.server.ray_app import command
from quire.server.ray_app.options import (
    DeployOptions,
    as_arguments,
    check_resources,
    engine_cpus,
    read_flags,
)


@pytest.mark.parametrize(
    ("replicas", "bounds"), [("1", (1, 1)), ("4", (4, 4)), ("2:16", (2, 16)), ("3:3", (3, 3))]
)
def test_numbers_of_engines(replicas: str, bounds: tuple[int, int]) -> None:
    options = DeployOptions(replicas=replicas)
    assert (options.min_replicas, options.max_replicas) == bounds


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replicas", "0"], "--replicas 0 is neither"),
        (["--replicas", "4:2"], "--replicas 4:2 is neither"),
        (["--replicas", "2:"], "--replicas 2: is neither"),
        (["--replicas", "-1"], "--replicas -1 is neither"),
        (["--replicas", "many"], "--replicas many is neither"),
        (["--fronts", "0"], "--fronts 0 is too small"),
        (["--target-wait", "0"], "--target-wait 0.0 is too small"),
        (["--engine-cpus", "nan"], "--engine-cpus nan is too small, or not finite"),
        (["--uds", "/tmp/socket"], "--uds does not go with `quire deploy`"),
        (["--http-workers", "2"], "--http-workers does not go .* use --fronts"),
        (["--data-parallel-size", "2"], "--data-parallel-size does not go .* use --replicas"),
        (["--lora-dir", "."], "--lora-dir does not go .* use --lora"),
        (["--kv-events-config", "{}"], "--kv-events-config does not go"),
        (["--port", "0"], "--port 0 does not go with"),
        (["--max-num-seqs", "0"], "max-num-seqs.*at least"),
        (["--replica", "2"], "unrecognized arguments: --replica"),
    ],
)
def test_refusals(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["deploy", *flags])
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_without_ray_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["deploy"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'quire-server[ray]'" in line


def test_printed_configuration_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    Path("quire.yaml").write_text("max_num_seqs: 7\nadmin_api_key: hush")
    flags = ["--replicas", "2:4", "--fronts", "2", "--api-key", "hush", "--config", "quire.yaml"]
    flags += ["--port", "9000", "--kv-cache-memory", "1GiB", "--print"]
    assert cli.main(["deploy", "model", *flags]) == 0
    printed = capsys.readouterr().out
    assert "QUIRE_API_KEY" in printed and "QUIRE_ADMIN_API_KEY" in printed
    assert "hush" not in printed
    document = yaml.safe_load(printed)
    assert document["http_options"] == {"host": "127.0.0.1", "port": 9000}
    (application,) = document["applications"]
    assert application["import_path"] == command.IMPORT_PATH
    options, settings = read_flags(application["args"])
    assert options == DeployOptions(replicas="2:4", fronts=2)
    assert settings.model == str(tmp_path / "model") and settings.served_names == ("model",)
    config = settings.engine_config()
    assert (config.max_num_seqs, config.kv_cache_memory_bytes) == (7, 2**30)
    assert as_arguments(options, settings, secrets=True) == application["args"]


def test_processors_are_divided_and_must_be_there() -> None:
    options = DeployOptions(replicas="2:4", fronts=2)
    assert engine_cpus(options, None, False, 18) == 4
    assert engine_cpus(options, None, False, 1) == 1
    assert engine_cpus(options, None, True, 18) == 1
    assert engine_cpus(options, 6, False, 18) == 6
    assert engine_cpus(DeployOptions(engine_cpus=0.5), 6, False, 18) == 0.5
    check_resources(options, {"CPU": 4, "GPU": 0}, {"CPU": 4})
    check_resources(options, {"CPU": 4, "GPU": 2}, {})
    with pytest.raises(ConfigurationError, match="needs 2 GPUs for 2 engines and 2 fronts, .* 1"):
        check_resources(options, {"CPU": 4, "GPU": 2}, {"CPU": 4, "GPU": 1})
    with pytest.raises(ConfigurationError, match="needs 5 CPUs"):
        check_resources(options, {"CPU": 5, "GPU": 0}, {"CPU": 4})
