"""Test `quire models`: what it prints, and that it neither loads a model nor imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quire.engine.checkpoints import hub
from quire.server import cli
from quire.server.commands import models

ROOT = Path(__file__).parents[3]
DEMO = str(ROOT / "configs" / "demo")


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_gpu_memory", lambda: None)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[Any]]:
    code = cli.main(["models", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_sizes_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, [found] = run_json(capsys, DEMO, "--memory", "100MB")
    assert code == 0
    assert found["architecture"] == "LlamaForCausalLM" and found["refused"] is None
    parameters, per_token = found["num_parameters"], found["kv_bytes_per_token"]
    assert found["weight_bytes"] == 4 * parameters and found["file_bytes"] == 2 * parameters
    tokens = (90_000_000 - 4 * parameters) // per_token
    assert found["kv_capacity_tokens"] == tokens
    assert found["sequences_by_context"] == {
        str(length): tokens // length for length in (2048, 8192, 16384)
    }


def test_a_dtype_and_a_gpu_change_the_sizes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, [full] = run_json(capsys, DEMO)
    _, [half] = run_json(capsys, DEMO, "--dtype", "bfloat16")
    assert 2 * half["weight_bytes"] == full["weight_bytes"]
    # By default the CPU keeps K and V in 16 bits beside weights in float32.
    assert half["kv_bytes_per_token"] == full["kv_bytes_per_token"]
    _, [exact] = run_json(capsys, DEMO, "--dtype", "float32")
    assert exact["kv_bytes_per_token"] == 2 * full["kv_bytes_per_token"]
    monkeypatch.setattr(models, "_gpu_memory", lambda: 24 * 2**30)
    _, [native] = run_json(capsys, DEMO)
    assert (native["dtype"], native["memory_bytes"]) == ("float16", 24 * 2**30)


def test_a_model_that_would_be_refused_fails_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["models", DEMO, str(tmp_path), "/no/such"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "refused" not in lines[1]
    assert "hqq" in lines[2] and "there is no folder /no/such" in lines[3]


def test_a_memory_that_is_too_small_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", DEMO, "--memory", "1MB"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_without_models_it_lists_those_that_are_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "cached_models", lambda: [DEMO])
    code, found = run_json(capsys)
    assert code == 0 and [item["model"] for item in found] == ["smollm2", DEMO]


@pytest.mark.parametrize("size", ["0", "much", "-1"])
def test_a_size_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], size: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["models", DEMO, f"--memory={size}"])
    assert caught.value.code == 2
    assert "--memory" in capsys.readouterr().err


def test_building_models_shows_more_reasons(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {"model_type": "falcon", "hidden_size": 32, "num_attention_heads": 4}
    config |= {"num_hidden_layers": 1, "vocab_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["models", str(tmp_path)]) == 0
    assert cli.main(["models", str(tmp_path), "--check"]) == 1
    assert "AttentionInterface" in capsys.readouterr().out


def test_the_command_imports_no_torch() -> None:
    code = (
        "import sys; from quire.server import cli; code = cli.main(['models', sys.argv[1]]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, DEMO], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "LlamaForCausalLM" in result.stdout
