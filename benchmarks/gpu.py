"""Check, time and tune the kernels and the engine on one GPU in one run, within a time budget.

    PYTHONPATH=tests/types python benchmarks/gpu.py --budget 580 --out results

The phases, in order: check every kernel against its oracle, time every kernel, run the engine
(gpu_engine.py, with the limits that were just measured), sweep tile shapes. Needs torch, triton and
transformers. Each phase runs in a process of its own and writes every record at once, so that
neither a crash nor the clock loses a measurement. A process cannot use CUDA after a CUDA error, so
a phase that dies continues in a new process after the case that killed it. Writes results.json and
summary.txt; the exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_targets import target_table
from gpu_workloads import SPOILED, table

ROOT = Path(__file__).parents[1]
ENGINE = "engine"
PHASES = {  # phase: (module, function, share of the budget left when it starts)
    "checks": ("gpu_checks", "cases", 0.3),
    "times": ("gpu_times", "cases", 0.35),
    ENGINE: ("gpu_engine", "main", 0.8),
    "sweep-decode": ("gpu_sweep", "decode_cases", 0.5),
    "sweep-extend": ("gpu_sweep", "extend_cases", 1.0),
}
Record = dict[str, Any]


def run_phase(phase: str, start: int, deadline: float, path: Path) -> int:
    """In the child: run the phase's cases from number `start` on, appending records to `path`.

    Returns the exit code: SPOILED if an error left the device unusable for this process.
    """
    import torch

    module, function, _ = PHASES[phase]
    cases = getattr(importlib.import_module(module), function)()
    torch.manual_seed(time.time_ns() % 2**31)
    with path.open("a") as file:
        for case in cases[start:]:
            record: Record = {"phase": phase, "name": case.name}
            begun = time.monotonic()
            if time.time() > deadline:
                record["skipped"] = "budget"
            else:
                try:
                    record |= case.run()
                    torch.cuda.synchronize()
                except Exception as error:
                    record["error"] = f"{type(error).__name__}: {error}"[:600]
                    record["traceback"] = traceback.format_exc()[-3000:]
            record["wall_s"] = round(time.monotonic() - begun, 2)
            file.write(json.dumps(record) + "\n")
            file.flush()
            if "error" in record and not _device_lives():
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


def read_records(path: Path) -> list[Record]:
    """Read the records written so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def drive_phase(phase: str, seconds: float, path: Path) -> str:
    """In the parent: run the phase, restarting it after each case that crashed its process.

    Returns in words how the phase ended.
    """
    end = time.time() + seconds
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'types'}"}
    while True:
        done = sum(record["phase"] == phase for record in read_records(path))
        command = [sys.executable, __file__, "--phase", phase, "--start", str(done)]
        command += ["--deadline", str(end - 5), "--out", str(path.parent)]
        try:
            code = subprocess.run(
                command, env=environment, timeout=max(20, end + 15 - time.time())
            ).returncode
        except subprocess.TimeoutExpired:
            return "stopped by the clock in a case"
        if code == 0:
            return "complete"
        after = sum(record["phase"] == phase for record in read_records(path))
        if code != SPOILED:  # it died without a record: name the case, and continue after it
            record = {"phase": phase, "name": f"case {after}", "error": f"exit code {code}"}
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if after == done == 0:
                return f"could not start: exit code {code}"
        if time.time() > end - 5:
            return "out of time after a crash"


def drive_engine(seconds: float, out: Path, records: list[Record]) -> str:
    """Run gpu_engine.py, restarting it after each stage that crashed it.

    The script keeps its own budget and writes each part at once. Returns in words how it ended.
    """
    script, end = Path(__file__).with_name("gpu_engine.py"), time.time() + seconds
    command = [sys.executable, str(script), "--out", str(out)]
    found = {record["name"]: record for record in records}
    if "gb_s" in found.get("limit copy", {}) and "tflop_s" in found.get("limit matmul", {}):
        bandwidth, compute = found["limit copy"]["gb_s"] / 1e3, found["limit matmul"]["tflop_s"]
        command += ["--limits", str(bandwidth), str(compute)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'types'}"}
    crashes: list[str] = []
    while True:
        left = end - time.time()
        budget = ["--budget", str(max(10.0, left - 15))]
        resume = ["--resume"] if crashes else []
        begun = _stages_begun(out)
        try:
            code = subprocess.run(
                command + budget + resume, env=environment, timeout=max(20.0, left + 15)
            ).returncode
        except subprocess.TimeoutExpired:
            return "; ".join([*crashes, "stopped by the clock in a part"])
        if code in (0, 1) and _stages_begun(out) > begun:
            return "; ".join(crashes) or "complete"
        crashes.append(f"exit code {code} in stage {_stages_begun(out)}")
        if _stages_begun(out) == begun or time.time() > end - 30:
            return "; ".join(crashes)


def _stages_begun(out: Path) -> int:
    """Read how many stages gpu_engine.py has begun."""
    path = out / "gpu_engine.json"
    return int(json.loads(path.read_text())["stages"]) if path.exists() else 0


def engine_results(out: Path) -> Record:
    """Read the results of gpu_engine.py by part."""
    path = out / "gpu_engine.json"
    results: Record = json.loads(path.read_text())["results"] if path.exists() else {}
    return results


def device_facts() -> Record:
    """Return the device's name, its SMs and the versions, or {"error": …} without a GPU."""
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


def _number(record: Record, key: str, limit: float | None, unit: str) -> str:
    if key not in record:
        return ""
    share = f" {record[key] / limit:4.0%}" if limit else ""
    return f"{record[key]:8.1f} {unit}{share}"


def _line(record: Record, limits: dict[str, Record]) -> str:
    if "error" in record:
        return f"{record['name']:42} ERROR {record['error'].splitlines()[0][:90]}"
    if "skipped" in record:
        return f"{record['name']:42} not run: {record['skipped']}"
    if "ok" in record:
        verdict = "PASS" if record["ok"] else "FAIL"
        return f"{record['name']:42} {verdict} {record['error_norm']:.1e} ≤ {record['limit']:.0e}"
    bandwidth = limits.get("limit copy", {}).get("gb_s")
    compute = limits.get("limit matmul", {}).get("tflop_s")
    return (
        f"{record['name']:42} {record['us']:9.1f} µs"
        f"{_number(record, 'gb_s', bandwidth, 'GB/s')}{_number(record, 'tflop_s', compute, 'TF/s')}"
    )


def report(
    records: list[Record],
    endings: dict[str, str],
    facts: Record,
    seconds: float,
    engine: Record,
) -> str:
    """Format failed checks, all times, the engine's parts and the best five of each sweep."""
    limits = {record["name"]: record for record in records if record["name"].startswith("limit")}
    lines = [json.dumps(facts), f"{seconds:.0f} s; phases: {endings}"]
    checks = [record for record in records if record["phase"] == "checks"]
    bad = [record for record in checks if not record.get("ok")]
    lines.append(f"checks: {len(checks) - len(bad)} of {len(checks)} pass")
    lines += [_line(record, limits) for record in bad]
    worst = sorted((r for r in checks if r.get("ok")), key=lambda r: -r["error_norm"] / r["limit"])
    lines += [f"  closest to its limit: {_line(record, limits)}" for record in worst[:2]]
    lines.append("times (share of the device's copy bandwidth, or of its 8192³ matmul):")
    lines += [_line(record, limits) for record in records if record["phase"] == "times"]
    if engine:
        lines.append("engine (tokens/s, share of the computed ceiling):")
        lines.append(table({"quire": engine}))
    lines.append("targets:")
    lines.append(target_table({record["name"]: record for record in records} | engine, {}))
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["phase"].startswith("sweep") and "us" in record:
            group = " ".join(word for word in record["name"].split() if not _is_setting(word))
            groups.setdefault(group, []).append(record)
    for group, members in groups.items():
        best = sorted(members, key=lambda record: float(record["us"]))
        shown = "; ".join(
            f"{' '.join(w for w in r['name'].split() if _is_setting(w))} {r['us']:.1f}"
            for r in best[:5]
        )
        lines.append(f"sweep {group} ({len(members)}), µs: {shown}; worst {best[-1]['us']:.1f}")
    failed = [r for r in records if r["phase"].startswith("sweep") and "error" in r]
    lines.append(
        f"sweep errors: {len(failed)}; first: {failed[0]['error'][:100] if failed else ''}"
    )
    return "\n".join(lines)


def _is_setting(word: str) -> bool:
    """Return whether a word of a case's name is a swept setting: m128, n64, chunk256, …"""
    return word.startswith("chunk") or (word[0] in "mnwspc" and word[1:].isdigit())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=580, help="seconds for all phases")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--only", choices=PHASES, nargs="*", help="phases to run (default: all)")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path = arguments.out / "results.jsonl"
    if arguments.phase:
        return run_phase(arguments.phase, arguments.start, arguments.deadline, path)
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = device_facts()
    if "error" in facts:
        print(f"no CUDA device can be used: {facts['error'].splitlines()[-1]}", file=sys.stderr)
        return 1
    for name in ("results.jsonl", "gpu_engine.json"):  # left by an earlier run
        (arguments.out / name).unlink(missing_ok=True)
    begun = time.time()
    endings: dict[str, str] = {}
    for phase in arguments.only or PHASES:
        left = arguments.budget - (time.time() - begun)
        share = 1.0 if arguments.only and len(arguments.only) == 1 else PHASES[phase][2]
        seconds = max(10.0, left * share)
        if phase == ENGINE:
            endings[phase] = drive_engine(seconds, arguments.out, read_records(path))
        else:
            endings[phase] = drive_phase(phase, seconds, path)
    records, engine = read_records(path), engine_results(arguments.out)
    summary = report(records, endings, facts, time.time() - begun, engine)
    (arguments.out / "summary.txt").write_text(summary + "\n")
    (arguments.out / "results.json").write_text(
        json.dumps(
            {"facts": facts, "phases": endings, "records": records, "engine": engine}, indent=1
        )
    )
    print(summary)
    checks = [record for record in records if record["phase"] == "checks"]
    failed = any(not record.get("ok") and "skipped" not in record for record in checks)
    failed |= any("error" in part or part.get("ok") is False for part in engine.values())
    return 1 if failed or not checks and not arguments.only else 0


if __name__ == "__main__":
    sys.exit(main())
