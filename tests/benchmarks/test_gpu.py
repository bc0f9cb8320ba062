"""Test the GPU benchmarks as far as they run without a GPU.

This covers the ceilings, workloads and reports, and every script up to where it needs its device.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import gpu  # noqa: E402
import gpu_stages  # noqa: E402
import gpu_targets  # noqa: E402
from gpu_shapes import (  # noqa: E402
    SHAPES,
    Limits,
    cost_of,
    decode_seconds,
    offline_seconds,
    prefill_seconds,
    write_config,
)
from gpu_workloads import Bench, Report, Result, table  # noqa: E402

LIMITS = Limits()


class FakeEngine:
    """An engine that prefills one prompt per step and gives every other request one token."""

    def __init__(self, kv_tokens: int = 10**6, lost: int = 0) -> None:
        self.kv_tokens, self.kv_bytes_per_element = kv_tokens, 2
        self.waiting: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.prompts: dict[str, list[int]] = {}
        self.lost = lost

    def add(self, name: str, prompt: list[int], max_tokens: int, *, sampled: bool = False) -> None:
        assert name not in self.prompts
        self.prompts[name] = prompt
        self.waiting[name], self.left[name] = len(prompt), max_tokens - self.lost

    def step(self) -> Mapping[str, int]:
        if self.waiting:
            del self.waiting[next(iter(self.waiting))]
        ready = [name for name in self.left if name not in self.waiting]
        for name in ready:
            self.left[name] -= 1
        self.left = {name: left for name, left in self.left.items() if left > 0}
        return dict.fromkeys(ready, 1)

    def has_work(self) -> bool:
        return bool(self.left)

    def abort(self, names: list[str]) -> None:
        for name in names:
            del self.left[name]


@pytest.mark.parametrize(
    "shape,batch,context,tokens_per_s",
    [
        ("qwen3-0.6b", 1, 1024, 3284),
        ("qwen3-0.6b", 256, 1024, 35218),
        ("llama-3.1-8b", 32, 1024, 7128),
        ("llama-3.1-8b", 32, 8192, 2787),
    ],
)
def test_decode_ceiling(shape: str, batch: int, context: int, tokens_per_s: float) -> None:
    """The expected figures were worked out by hand from weights, K and V, and 4.3 TB/s."""
    found = batch / decode_seconds(cost_of(shape), batch, context, LIMITS)
    assert found == pytest.approx(tokens_per_s, rel=0.005)


def test_prefill_and_workload_ceilings() -> None:
    cost = cost_of("llama-3.1-8b")
    assert 8192 / prefill_seconds(cost, 8192, LIMITS) == pytest.approx(49_000, rel=0.005)
    two = offline_seconds(cost, [(100, 3), (200, 1)], LIMITS)
    steps = [(2, 150.0), (1, 101.0), (1, 102.0)]
    decodes = sum(decode_seconds(cost, batch, context, LIMITS) for batch, context in steps)
    prefills = sum(prefill_seconds(cost, length, LIMITS) for length in (100, 200))
    assert two == pytest.approx(prefills + decodes)
    fp8 = cost_of("llama-3.1-8b", 1)
    assert fp8.kv == cost.kv / 2 and fp8._replace(kv=cost.kv) == cost


def test_every_workload_runs(tmp_path: Path) -> None:
    report = Report(100, tmp_path / "new" / "out.json", {"engine": "fake"})
    engine = FakeEngine()
    bench = Bench(engine, "tiny", LIMITS)
    bench.first_token()
    bench.run_all(report, "tiny")
    bench.run_fp8(report, "tiny")
    assert not engine.left and not report.failed
    assert len(report.results) == 11
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert written["facts"] == {"engine": "fake"} and written["results"] == report.results
    assert not written["stages"] and not written["running"]
    for name, result in report.results.items():
        rate = result["tokens"] / result["seconds"]
        assert result["tokens_per_s"] == pytest.approx(rate), name
        assert result["share"] == pytest.approx(rate / result["ceiling"]), name
    assert report.results["tiny decode 3x64"]["tokens"] == 12
    assert all(0 <= token < 2048 for prompt in engine.prompts.values() for token in prompt)
    shared = [prompt for prompt in engine.prompts.values() if len(prompt) == 632]
    assert len(shared) == 5 and len({tuple(prompt[:600]) for prompt in shared}) == 1


def test_a_workload_that_does_not_fit_is_skipped_and_lost_tokens_are_an_error() -> None:
    assert "fit" in Bench(FakeEngine(kv_tokens=100), "tiny", LIMITS).decode(3, 64)["skipped"]
    with pytest.raises(RuntimeError, match="tokens instead"):
        Bench(FakeEngine(lost=1), "tiny", LIMITS).offline()


def test_a_report_keeps_its_budget_and_continues_after_a_failure(tmp_path: Path) -> None:
    report = Report(50, tmp_path / "out.json", {})

    def broken() -> Result:
        raise ValueError("no")

    report.run("a", lambda: {"ok": True})
    assert not report.failed
    report.run("b", broken)
    report.run("c", dict, need=60)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["b"]["error"] == "ValueError: no" and report.failed
    assert results["c"] == {"skipped": "out of budget"}


def test_a_dead_device_ends_the_process_and_its_report_can_be_resumed(tmp_path: Path) -> None:
    def broken() -> Result:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    path = tmp_path / "out.json"
    report = Report(50, path, {}, device_lives=lambda: False)
    report.begin_stage("first")
    report.run("a", lambda: {"ok": True})
    with pytest.raises(SystemExit) as caught:
        report.run("b", broken)
    assert caught.value.code == gpu.SPOILED
    resumed = Report(50, path, {}, resume=True)
    assert resumed.stages == ["first"] and list(resumed.results) == ["a", "b"] and resumed.failed
    assert not Report(50, path, {}).results


def test_a_part_that_ends_its_process_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    report = Report(50, path, {})
    report.run("a", lambda: {"ok": True})
    report.run("b", lambda: {"seen": json.loads(path.read_text())["running"]})
    assert report.results["b"]["seen"] == "b"
    path.write_text(path.read_text().replace('"running": ""', '"running": "c"'))
    resumed = Report(50, path, {}, resume=True)
    assert list(resumed.results) == ["a", "b", "c"] and "died" in resumed.results["c"]["error"]


def test_a_part_that_hangs_ends_its_process(tmp_path: Path) -> None:
    code = f"""
import sys, time, pathlib
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_workloads
gpu_workloads.PATIENCE = 0.1
report = gpu_workloads.Report(50, pathlib.Path({str(tmp_path / "out.json")!r}), {{}})
report.run("stuck", lambda: time.sleep(60), need=0.1)
"""
    done = run("-c", code)
    assert done.returncode == 1 and "time.sleep" not in done.stdout and "Timeout" in done.stderr
    resumed = Report(50, tmp_path / "out.json", {}, resume=True)
    assert "too long" in resumed.results["stuck"]["error"]


@pytest.mark.parametrize("dies_in", [None, "one", "two"])
def test_engine_stages_continue_after_a_crash(
    dies_in: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash before anything has begun leaves nothing to continue from."""
    path = tmp_path / "gpu_engine.json"
    commands: list[list[str]] = []
    names = ("one", "two", "three")

    def fake_run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command[command.index("--stages") + 1 :])
        crashes = len(commands) == 1
        begun = names[: names.index(dies_in) + 1] if dies_in else ()
        if begun:
            path.write_text(json.dumps({"stages": begun if crashes else names, "results": {}}))
        return subprocess.CompletedProcess(command, -11 if crashes else 0)

    monkeypatch.setattr(subprocess, "run", fake_run)
    ending = gpu.drive_engine(names, 100, tmp_path, [])
    if dies_in is None:
        assert ending == "exit code -11 in its start" and commands == [list(names)]
    else:
        rest = list(names[names.index(dies_in) + 1 :])
        assert ending == f"exit code -11 in {dies_in}" and commands == [list(names), rest]


def test_every_stage_has_cases_and_no_case_is_in_two(capsys: pytest.CaptureFixture[str]) -> None:
    code = """
import collections, json, gpu, gpu_engine, gpu_stages, gpu_workloads
found = {stage.name: [case.name for _, case in gpu.cases_of(stage)] for stage in gpu_stages.STAGES}
report = gpu_workloads.Report(1, __import__("pathlib").Path("/dev/null"), {})
one = [(name, None) for name in list(gpu_engine.SHAPES)[:2]]
class Any:
    run = run_points = run_comparisons = run_transformers = None
known = gpu_engine.stages(report, [(name, Any()) for name, _ in one], checks=True)
named = [name for stage in gpu_stages.STAGES for name in stage.engine]
print(json.dumps([found, sorted(set(named) - set(known)), sorted(set(known) - set(named))]))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    found, unknown, left_out = json.loads(done.stdout)
    assert not unknown and left_out == ["llama-3.1-8b generate_batch", "llama-3.1-8b points"]
    counts = {name: len(cases) for name, cases in found.items()}
    kernels = [stage for stage in gpu_stages.STAGES if stage.cases]
    assert all(counts[stage.name] >= 7 for stage in kernels), counts
    names = [name for cases in found.values() for name in cases]
    assert len(names) == len(set(names)) > 300
    smoke = found["smoke"]
    assert smoke[:3] == ["limit copy", "limit read", "limit matmul"] and len(smoke) < 18
    assert "bfloat16 extend 20 times" in smoke and counts["kernels"] <= 30


def test_a_case_that_ends_its_process_is_named_and_the_next_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, path = gpu_stages.STAGES[0], tmp_path / "results.jsonl"
    starts: list[int] = []

    def fake_run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        start = int(command[command.index("--start") + 1])
        starts.append(start)
        names = [f"case {index}" for index in range(4)][start:]
        with path.open("a") as file:
            for name in names:
                record = {"stage": stage.name, "phase": "checks", "name": name}
                (tmp_path / "begun.json").write_text(json.dumps(record))
                if name == "case 1":
                    return subprocess.CompletedProcess(command, 1)
                file.write(json.dumps(record) + "\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fake_run)
    assert gpu.drive_cases(stage, 100, path, stub=False) == "complete"
    assert starts == [0, 2]
    records = gpu.read_records(path)
    assert [record["name"] for record in records] == [f"case {index}" for index in range(4)]
    assert "ended with 1" in records[1]["error"]


def test_targets_name_measured_parts(tmp_path: Path) -> None:
    report = Report(100, tmp_path / "out.json", {})
    for shape in (gpu_targets.QWEN, gpu_targets.LLAMA):
        Bench(FakeEngine(10**8), shape, LIMITS).run_all(report, shape)
    known = set(report.results) | {f"{gpu_targets.LLAMA} start"}
    known |= {f"{gpu_targets.LLAMA} no cascade shared prefix"}
    kernels = run("-c", "import gpu_times; [print(case.name) for case in gpu_times.cases()]")
    known |= set(kernels.stdout.splitlines())
    for target in gpu_targets.TARGETS:
        assert target.name in known and target.other in known | {"", "vllm"}, target


def test_target_table_compares_outcomes_with_targets_and_predictions() -> None:
    llama = gpu_targets.LLAMA
    results: dict[str, Result] = {
        "limit copy": {"gb_s": 4000.0},
        "decode llama 64x4096 b16": {"gb_s": 3700.0},
        "extend llama 8k b16": {"tflop_s": 300.0},
        f"{llama} offline 256": {"tokens_per_s": 11_000.0, "share": 0.81},
        f"{llama} start": {"first_token_s": 40.0, "imports_s": 9.0},
    }
    vllm: dict[str, Result] = {f"{llama} offline 256": {"tokens_per_s": 10_000.0}}
    lines = {line[:36].strip(): line[36:].split() for line in
             gpu_targets.target_table(results, vllm).splitlines()}  # fmt: skip
    assert lines["decode attention, 1 GB"] == ["90%", "90%", "92%", "met"]
    assert lines["extend 8k, paged"] == ["400", "TF/s", "380", "TF/s", "300", "TF/s", "missed"]
    assert lines["offline, 8B, over vLLM"] == ["1.05×", "1.10×", "met"]
    assert lines["start to first token, 8B"] == ["60", "s", "45", "s", "49", "s", "met"]
    assert lines["offline, 0.6B"] == ["70%", "78%"]


def test_docs_list_the_predictions() -> None:
    docs = (BENCHMARKS.parent / "docs" / "benchmarking.md").read_text()
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]]
            for line in docs.splitlines() if line.count("|") == 6}  # fmt: skip
    for target in gpu_targets.TARGETS:
        shown = [gpu_targets.shown(target, value) for value in (target.target, target.predicted)]
        assert rows[target.work] == shown


def test_table_compares_two_engines() -> None:
    lines = table(
        {
            "quire": {"a": {"tokens_per_s": 300.0, "share": 0.5}, "b": {"error": "x"}},
            "vllm": {"a": {"tokens_per_s": 200.0}, "start": {"first_token_s": 9.5}},
        }
    ).splitlines()
    assert lines[1].split() == ["a", "300", "50.0%", "200", "1.50×"]
    assert lines[2].split() == ["b", "error"]
    assert lines[3].split() == ["start", "9.5", "s"]


def test_report_summarises_a_run() -> None:
    times = {"phase": "times", "us": 10.0}
    records = [
        {"phase": "checks", "name": "good", "ok": True, "error_norm": 1e-4, "limit": 1e-2},
        {"phase": "checks", "name": "exact", "ok": True, "error_norm": 0.0, "limit": 0.0},
        {"phase": "checks", "name": "bad", "ok": False, "error_norm": 0.5, "limit": 1e-2},
        times | {"name": "limit copy", "gb_s": 4000.0},
        times | {"name": "decode", "gb_s": 3000.0},
        {"phase": "sweep-decode", "name": "decode 1x8 m16 n64", "us": 7.0},
        {"phase": "sweep-decode", "name": "decode 1x8 m16 n32", "us": 5.0},
    ]
    text = gpu.report(records, {"checks": "complete"}, {}, 1.0, {"a": {"tokens_per_s": 5.0}})
    assert "checks: 2 of 3 pass" in text and "FAIL 5.0e-01" in text
    assert "3000.0 GB/s  75%" in text
    assert "sweep decode 1x8 (2), µs: m16 n32 5.0; m16 n64 7.0" in text
    assert "engine" in text


def run(*arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent / "tests" / "types")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def flags_of(words: Iterable[str]) -> set[str]:
    return {flag for word in words for flag in re.findall(r"--[a-z][a-z-]*", word)}


def test_the_engine_benchmark_accepts_the_flags_it_is_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def crash(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (tmp_path / "gpu_engine.json").write_text('{"stages": ["a"], "results": {}}')
        return subprocess.CompletedProcess(command, 3)

    limits = [{"name": "limit copy", "gb_s": 4e3}, {"name": "limit matmul", "tflop_s": 700.0}]
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", crash)
        ending = gpu.drive_engine(("a", "b"), 1000.0, tmp_path, limits, stub=True)
    assert ending == "exit code 3 in a; exit code 3 in a"
    flags = flags_of(word for command in commands for word in command)
    assert flags == {"--out", "--limits", "--budget", "--resume", "--stages", "--stub"}
    done = run("gpu_engine.py", "--help")
    assert done.returncode == 0, done.stderr
    assert flags <= flags_of([done.stdout])


def test_the_vllm_benchmark_imports_without_vllm_and_accepts_the_same_flags() -> None:
    code = "import sys; sys.modules['vllm'] = None; import vllm_gpu; vllm_gpu.main()"
    done = run("-c", code, "-h")
    assert done.returncode == 0, done.stderr
    shared = {"--budget", "--out", "--shapes", "--limits", "--enforce-eager"}
    assert shared <= flags_of([done.stdout]) & flags_of([run("gpu_engine.py", "-h").stdout])


def test_a_missing_device_is_a_one_line_error(tmp_path: Path) -> None:
    done = run("gpu.py", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("no CUDA device can be used") and not done.stdout


def test_cases_can_be_built_without_http_packages() -> None:
    code = """
import sys
for name in ("fastapi", "pydantic", "uvicorn", "zmq", "msgspec", "structlog", "prometheus_client"):
    sys.modules[name] = None
import gpu_checks, gpu_engine, gpu_sweep, gpu_times
for cases in (gpu_checks.cases, gpu_times.cases, gpu_sweep.decode_cases, gpu_sweep.extend_cases):
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names) > 20, sorted(names)
print("fine")
"""
    done = run("-c", code)
    assert done.stdout == "fine\n", done.stderr


def test_a_run_reaches_its_last_line_without_a_gpu(tmp_path: Path) -> None:
    """Two stages of the run, on tensors without memory and a tiny model; `make test-gpu` runs all
    of them."""
    arguments = ["--stub", "--budget", "280", "--out", str(tmp_path), "--only", "smoke", "0.6B"]
    if os.environ.get("QUIRE_GPU_STUB_ALL"):
        arguments = [*arguments[:2], "3000", *arguments[3:5]]
    done = run("gpu.py", *arguments, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    endings = [part for ending in content["stages"].values() for part in ending.split("; ")]
    assert set(endings) == {"complete"}
    assert all("error" not in record for record in content["records"])
    assert all("error" not in part for part in content["engine"].values())
    summary = (tmp_path / "summary.txt").read_text()
    assert "targets:" in summary and "device idle" in summary
    assert done.stdout.rstrip().endswith(summary.rstrip()[-200:])


def test_shapes_are_valid_model_configurations(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for shape, values in SHAPES.items():
        write_config(shape, tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert all(getattr(config, key) == value for key, value in values.items()
                   if key not in ("rope_theta", "model_type")), shape  # fmt: skip
