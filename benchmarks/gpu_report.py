"""The summary of a run on a GPU, from the records that its stages wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_targets import target_table
from gpu_workloads import profile_table, table

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Read the records written so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def engine_results(out: Path) -> Record:
    """Read the results of gpu_engine.py by part."""
    path = out / "gpu_engine.json"
    results: Record = json.loads(path.read_text())["results"] if path.exists() else {}
    return results


def _number(record: Record, key: str, limit: float | None, unit: str) -> str:
    if key not in record:
        return ""
    share = f" {record[key] / limit:4.0%}" if limit else ""
    return f"{record[key]:8.1f} {unit}{share}"


def _closeness(check: Record) -> float:
    """Return a passed check's error as a share of its limit, which is 0 if it must be exact."""
    return float(check["error_norm"] / check["limit"]) if check["limit"] else 0.0


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
    lines = [json.dumps(facts), f"{seconds:.0f} s; stages: {endings}"]
    checks = [record for record in records if record["phase"] == "checks"]
    bad = [record for record in checks if not record.get("ok")]
    lines.append(f"checks: {len(checks) - len(bad)} of {len(checks)} pass")
    lines += [_line(record, limits) for record in bad]
    worst = sorted((r for r in checks if r.get("ok")), key=_closeness, reverse=True)
    lines += [f"  closest to its limit: {_line(record, limits)}" for record in worst[:2]]
    lines.append("times (share of the device's copy bandwidth, or of its 8192³ matmul):")
    lines += [_line(record, limits) for record in records if record["phase"] == "times"]
    if engine:
        lines.append("engine (tokens/s, share of the computed ceiling):")
        lines.append(table({"quire": engine}))
        lines.append(profile_table(engine))
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
    return word.startswith("chunk") or (word[0] in "mnwspci" and word[1:].isdigit())
