"""Check, time and tune the kernels and the engine on one GPU in one run, within a time budget.

    PYTHONPATH=tests/types python benchmarks/gpu.py --budget 545 --out results

The stages are those of gpu_stages.py: a smoke test, the whole engine (gpu_engine.py, with the
limits that were just measured), the kernels' times, tile shapes, then what is left. Kernels are
compiled first, in many processes (gpu_cache.py), or come from an archive with `--cache`. Needs
torch, triton and transformers. Each stage runs in a process of its own and writes every record at
once; summary.txt and results.json are written after each stage. So neither a crash nor the clock
loses a measurement. A process cannot use CUDA after a CUDA error, so a stage whose process dies
continues in a new one after the case that killed it; so it does if a case hangs. The exit code is 1
if a check failed. `--stub` runs everything to the last line without a GPU, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_report import Record, engine_results, read_records, report
from gpu_stages import BUDGET, KINDS, STAGES, Stage
from gpu_workloads import SPOILED

ROOT = Path(__file__).parents[1]
CASE_SECONDS = 45.0
"""A case that takes longer hangs."""
COMPILE_SECONDS = 90.0


def cases_of(stage: Stage) -> list[tuple[str, Any]]:
    """Return the stage's cases, each with its kind, that are in no earlier stage."""
    earlier = STAGES[: STAGES.index(stage)]
    found = []
    for kind in dict.fromkeys(kind for kind, _ in stage.cases):
        module, function = KINDS[kind]
        for case in getattr(importlib.import_module(module), function)():
            if stage.picks(kind, case.name) and not any(e.picks(kind, case.name) for e in earlier):
                found.append((kind, case))
    return found


def run_stage(stage: Stage, start: int, deadline: float, path: Path, stub: bool) -> int:
    """In the child: run the stage's cases from number `start` on, appending records to `path`.

    Returns the exit code: SPOILED if an error left the device unusable for this process.
    """
    import torch

    cases = cases_of(stage)
    torch.manual_seed(time.time_ns() % 2**31)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("a"))
        if stub:
            stack.enter_context(importlib.import_module("gpu_stub").stub_gpu(90, compiles=False))
        for kind, case in cases[start:]:
            record: Record = {"stage": stage.name, "phase": kind, "name": case.name}
            path.with_name("begun.json").write_text(json.dumps(record))
            begun = time.monotonic()
            if time.time() > deadline:
                record["skipped"] = "budget"
            else:
                # Ends the process even within a call that never returns, with all stacks.
                faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
                try:
                    record |= case.run()
                    torch.cuda.synchronize()
                except Exception as error:
                    record["error"] = f"{type(error).__name__}: {error}"[:600]
                    record["traceback"] = traceback.format_exc()[-3000:]
                faulthandler.cancel_dump_traceback_later()
            record["wall_s"] = round(time.monotonic() - begun, 2)
            file.write(json.dumps(record) + "\n")
            file.flush()
            if "error" in record and not stub and not _device_lives():
                return SPOILED
    return 0


def _device_lives() -> bool:
    """Return whether this process can still use the device."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return False
    return True


def _environment() -> dict[str, str]:
    """Return the environment of children, with quire importable beside what already was."""
    paths = [str(ROOT / "tests" / "types"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def drive_cases(stage: Stage, seconds: float, path: Path, stub: bool) -> str:
    """In the parent: run the stage's cases, in a new process after each one that ended its own.

    Returns in words how the stage ended.
    """
    end = time.time() + seconds
    while True:
        done = sum(record["stage"] == stage.name for record in read_records(path))
        command = [sys.executable, __file__, "--stage", stage.name, "--start", str(done)]
        command += ["--deadline", str(end - 5), "--out", str(path.parent), *["--stub"] * stub]
        try:
            code = subprocess.run(
                command, env=_environment(), timeout=max(20, end + 15 - time.time())
            ).returncode
        except subprocess.TimeoutExpired:
            return "stopped by the clock in a case"
        if code == 0:
            return "complete"
        after = sum(record["stage"] == stage.name for record in read_records(path))
        if code != SPOILED and not _name_the_case(stage, code, path):
            return f"could not start: exit code {code}"
        if after == done and code == SPOILED:
            return "could not start: the device is unusable"
        if time.time() > end - 5:
            return "out of time after a crash"


def _name_the_case(stage: Stage, code: int, path: Path) -> bool:
    """Record the case in which a process died or hung; return False if it died before its first."""
    begun = path.with_name("begun.json")
    if not begun.exists():
        return False
    record: Record = json.loads(begun.read_text())
    begun.unlink()
    if record["stage"] != stage.name:
        return False
    record["error"] = f"the process ended with {code} (1 after {CASE_SECONDS:.0f} s in one case)"
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return True


def drive_engine(
    names: tuple[str, ...], seconds: float, out: Path, records: list[Record], stub: bool = False
) -> str:
    """Run these stages of gpu_engine.py, and what is left of them after each crash.

    The script keeps its own budget and writes each part at once. Returns in words how it ended.
    """
    script, end = Path(__file__).with_name("gpu_engine.py"), time.time() + seconds
    command = [sys.executable, str(script), "--out", str(out), "--resume", *["--stub"] * stub]
    found = {record["name"]: record for record in records}
    if "gb_s" in found.get("limit copy", {}) and "tflop_s" in found.get("limit matmul", {}):
        bandwidth, compute = found["limit copy"]["gb_s"] / 1e3, found["limit matmul"]["tflop_s"]
        command += ["--limits", str(bandwidth), str(compute)]
    crashes: list[str] = []
    while True:
        left = end - time.time()
        budget = ["--budget", str(max(10.0, left - 15)), "--stages", *names]
        try:
            code = subprocess.run(
                command + budget, env=_environment(), timeout=max(20.0, left + 15)
            ).returncode
        except subprocess.TimeoutExpired:
            return "; ".join([*crashes, "stopped by the clock in a part"])
        if code in (0, 1):
            return "; ".join(crashes) or "complete"
        begun = stages_begun(out)
        rest = tuple(name for name in names if name not in begun)
        crashes.append(f"exit code {code} in {begun[-1] if begun else 'its start'}")
        if not rest or rest == names or time.time() > end - 30:
            return "; ".join(crashes)
        names = rest


def stages_begun(out: Path) -> list[str]:
    """Read which stages gpu_engine.py has begun."""
    path = out / "gpu_engine.json"
    begun: list[str] = json.loads(path.read_text())["stages"] if path.exists() else []
    return begun


def device_facts(stub: bool) -> Record:
    """Return the device's name, its SMs and the versions, or {"error": …} without a GPU."""
    if stub:
        return {"device": "stub"}
    code = (
        "import json, torch, triton; p = torch.cuda.get_device_properties(0);"
        "print(json.dumps({'device': p.name, 'sms': p.multi_processor_count,"
        "'torch': torch.__version__, 'triton': triton.__version__}))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-600:]}
    facts: Record = json.loads(done.stdout)
    return facts


def compile_ahead(archive: Path | None, stub: bool) -> str:
    """Unpack an archive of compiled kernels, then compile what it lacks. Returns what was done."""
    script = Path(__file__).with_name("gpu_cache.py")
    folder = Path(os.environ.setdefault("TRITON_CACHE_DIR", str(Path.cwd() / "triton-cache")))
    if archive is not None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as files:
            files.extractall(folder.parent, filter="data")
        (folder.parent / "cache").rename(folder)
    command = [sys.executable, str(script), *(["--only", "^layer tiny$"] if stub else [])]
    try:
        done = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, timeout=COMPILE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"stopped by the clock after {COMPILE_SECONDS:.0f} s"
    return (done.stdout.strip() or done.stderr)[-1500:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all stages")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--only", choices=[stage.name for stage in STAGES], nargs="*")
    parser.add_argument("--cache", type=Path, help="archive of compiled kernels (gpu_cache.py)")
    parser.add_argument("--stub", action="store_true", help="run without a GPU, for trying this")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path, stub = arguments.out / "results.jsonl", arguments.stub
    if arguments.stage:
        stage = next(stage for stage in STAGES if stage.name == arguments.stage)
        return run_stage(stage, arguments.start, arguments.deadline, path, stub)
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = device_facts(stub)
    if "error" in facts:
        print(f"no CUDA device can be used: {facts['error'].splitlines()[-1]}", file=sys.stderr)
        return 1
    for name in ("results.jsonl", "gpu_engine.json", "begun.json"):  # left by an earlier run
        (arguments.out / name).unlink(missing_ok=True)
    begun = time.time()
    facts["compiled"] = compile_ahead(arguments.cache, stub)
    print(facts["compiled"], flush=True)
    chosen = [stage for stage in STAGES if not arguments.only or stage.name in arguments.only]
    endings: dict[str, str] = {}
    summary = ""
    for number, stage in enumerate(chosen):
        # What earlier stages did not use, or used too much of, is shared by all that are left.
        left = begun + arguments.budget - time.time()
        seconds = left * stage.seconds / sum(later.seconds for later in chosen[number:])
        if left < 10:
            endings[stage.name] = "not reached"
            continue
        parts = (bool(stage.cases), bool(stage.engine))
        if stage.cases:
            endings[stage.name] = drive_cases(stage, seconds / sum(parts), path, stub)
        if stage.engine:
            ending = drive_engine(
                stage.engine, seconds / sum(parts), arguments.out, read_records(path), stub
            )
            endings[stage.name] = "; ".join(filter(None, [endings.get(stage.name), ending]))
        summary = write_results(arguments.out, endings, facts, time.time() - begun)
    print(summary)
    return int(has_failed(arguments.out))


def write_results(out: Path, endings: dict[str, str], facts: Record, seconds: float) -> str:
    """Write summary.txt and results.json of what has been measured so far; return the summary."""
    records, engine = read_records(out / "results.jsonl"), engine_results(out)
    summary = report(records, endings, facts, seconds, engine)
    (out / "summary.txt").write_text(summary + "\n")
    content = {"facts": facts, "stages": endings, "records": records, "engine": engine}
    (out / "results.json").write_text(json.dumps(content, indent=1))
    return summary


def has_failed(out: Path) -> bool:
    """Return whether a check or a part of the engine failed, or nothing was checked."""
    checks = [r for r in read_records(out / "results.jsonl") if r["phase"] == "checks"]
    parts = engine_results(out).values()
    failed = any(not check.get("ok") and "skipped" not in check for check in checks)
    failed |= any("error" in part or part.get("ok") is False for part in parts)
    return failed or not (checks or parts)


if __name__ == "__main__":
    sys.exit(main())
