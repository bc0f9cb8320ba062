"""Test the engine's own benchmark on a tiny model: it counts every token and reports mistakes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine.bench.__main__ import main
from quire.engine.bench.arguments import NOT_OFFERED, add_latency_arguments, engine_config
from quire.engine.bench.workload import Workload, run_workload, uniform_lengths
from quire.engine.config import EngineConfig, engine_flags
from quire.engine.core.engine_core import EngineCore
from quire.engine.errors import ContextLengthError
from quire.engine.runner.worker import Worker

from ..models import save_model
from ..worker_driver import make_config

ENGINE = ("--device", "cpu", "--num-threads", "1", "--num-gpu-blocks-override", "64")
BARE = """
import runpy, sys
for name in ("fastapi", "starlette", "uvicorn", "pydantic", "zmq", "msgspec", "structlog"):
    sys.modules[name] = None  # importing it raises ImportError
sys.argv = ["bench", *sys.argv[1:]]
runpy.run_module("quire.engine.bench", run_name="__main__")
"""

pytestmark = pytest.mark.usefixtures("same_number_of_threads")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


def make_core(model: Path) -> EngineCore:
    config = make_config(model)
    return EngineCore(config, Worker(config))


def run(model: Path, tmp_path: Path, command: str, *flags: str) -> dict[str, Any]:
    file = tmp_path / "result.json"
    assert main([command, "--model", str(model), *ENGINE, *flags, "--output-json", str(file)]) == 0
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def test_lengths_are_uniform_and_decided_by_the_seed() -> None:
    lengths = uniform_lengths(500, 20, 10, 0.5, 3)
    prompts, outputs = zip(*lengths, strict=True)
    assert (min(prompts), max(prompts), min(outputs), max(outputs)) == (10, 30, 5, 15)
    assert lengths == uniform_lengths(500, 20, 10, 0.5, 3) != uniform_lengths(500, 20, 10, 0.5, 4)
    assert set(uniform_lengths(5, 20, 10, 0.0, 3)) == {(20, 10)}
    assert min(uniform_lengths(50, 1, 1, 0.9, 3)) == (1, 1)


def test_a_workload_repeats_exactly_and_ends_by_length(model: Path) -> None:
    core = make_core(model)
    workload = Workload(((20, 4), (33, 6)), n=2, temperature=1.0, seed=5)
    first, second = workload.requests(128), workload.requests(128)
    assert [r.prompt_token_ids for r in first] == [r.prompt_token_ids for r in second]
    assert [len(r.prompt_token_ids) for r in first] == [20, 33]
    result = run_workload(core, workload)
    assert (result.prompt_tokens, result.output_tokens) == (53, 2 * (4 + 6))
    assert result.num_requests == 2 and result.cached_tokens == 0
    assert result.num_steps >= 6
    assert result.output_tokens_per_s == pytest.approx(20 / result.elapsed_s)
    assert result.total_tokens_per_s == pytest.approx(73 / result.elapsed_s)
    assert 0 < result.step_ms_median <= result.step_ms_p99
    assert 0 < result.peak_kv_usage <= 1


def test_a_repeated_workload_has_prefix_hits_until_the_cache_is_reset(model: Path) -> None:
    core = make_core(model)
    workload = Workload(((40, 2),), n=1, temperature=0.0, seed=5)
    run_workload(core, workload)
    assert run_workload(core, workload).cached_tokens == 39
    core.reset_prefix_cache()
    assert run_workload(core, workload).cached_tokens == 0


def test_a_request_that_cannot_run_is_an_error(model: Path) -> None:
    with pytest.raises(ContextLengthError):
        run_workload(make_core(model), Workload(((500, 2),), n=1, temperature=0.0, seed=0))


def test_throughput_times_profiles_and_saves(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "profile.txt"
    flags = ("--num-prompts", "3", "--input-len", "20", "--output-len", "5", "--n", "2")
    document = run(model, tmp_path, "throughput", *flags, "--profile", str(profile))
    result = document["result"]
    assert (result["prompt_tokens"], result["output_tokens"]) == (60, 30)
    assert result["cached_tokens"] == 0
    assert document["engine"]["architecture"] == "LlamaForCausalLM"
    assert document["options"]["input_len"] == 20 and document["command"] == sys.argv
    assert document["versions"]["torch"] == torch.__version__
    assert f"output tokens/s {result['output_tokens_per_s']:.1f}" in capsys.readouterr().out
    table = profile.read_text()
    assert "steps in" in table.splitlines()[0]
    assert "Ordered by: cumulative time" in table and "Ordered by: internal time" in table
    assert "(schedule)" in table and "(forward)" in table


def test_latency_is_the_median_of_its_repetitions(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--batch-size", "2", "--input-len", "9", "--output-len", "4", "--num-iters", "3")
    result = run(model, tmp_path, "latency", *flags, "--num-iters-warmup", "1")["result"]
    assert len(result["latencies_s"]) == 3
    assert result["latency_s_median"] == sorted(result["latencies_s"])[1]
    assert result["latency_s_min"] == min(result["latencies_s"])
    assert "of 3 repetitions" in capsys.readouterr().out


def test_mistakes_end_with_a_one_line_error(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["throughput", "--model", str(model), *ENGINE]
    assert main([*common, "--input-len", "1000"]) == 1
    assert "maximum context length is" in capsys.readouterr().err
    assert main([*common, "--random-range-ratio", "1"]) == 1
    assert "below 1" in capsys.readouterr().err
    assert main(["latency", "--model", str(model / "none"), *ENGINE]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("flags", ["--num-prompts 0", "--input-len -1", "--dtype int8"])
def test_values_out_of_bounds_are_refused(flags: str, model: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["throughput", "--model", str(model), *flags.split()])
    assert caught.value.code == 2


def test_it_runs_without_http_and_messaging_packages(model: Path) -> None:
    flags = [
        "--num-prompts",
        "2",
        "--input-len",
        "8",
        "--output-len",
        "2",
        "--load-format",
        "dummy",
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", BARE, "throughput", "--model", str(model), *ENGINE, *flags],
        capture_output=True,
        text=True,
        env={"PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "4 output tokens" in done.stdout


def test_engine_flags_of_serve_are_arguments_here(model: Path) -> None:
    parser = argparse.ArgumentParser()
    add_latency_arguments(parser, str(model))
    assert engine_config(parser.parse_args([])) == EngineConfig(model=str(model), seed=0)
    changed = parser.parse_args(["--no-async-scheduling", "--no-enable-prefix-caching", *ENGINE])
    config = engine_config(changed)
    assert (config.async_scheduling, config.enable_prefix_caching) == (False, False)
    assert (config.device, config.num_threads, config.num_blocks) == ("cpu", 1, 64)
    flags = {flag.field: "--" + flag.name.replace("_", "-") for flag in engine_flags()}
    offered = set(parser._option_string_actions)
    assert {field for field, flag in flags.items() if flag not in offered} == NOT_OFFERED - {"seed"}
