"""Compare the goals of the GPU work with predictions and measurements, side by side.

    python benchmarks/gpu_targets.py DIR

reads DIR/results.json, and DIR/vllm_gpu.json if it exists. Predictions were worked out before any
measurement, for one H200: docs/benchmarking.md says how. Needs only the standard library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

Results = Mapping[str, Mapping[str, Any]]
"""Measurements by the part's name."""


class Target(NamedTuple):
    """A goal for one figure of the part `name`.

    `figure` is a share of the copy bandwidth or of the computed ceiling, TFLOP/s, seconds from the
    start to a first token, or tokens/s divided by those of `other` (a part, or "vllm").
    """

    work: str
    name: str
    figure: Literal["bandwidth", "ceiling", "TFLOP/s", "seconds", "ratio"]
    target: float
    predicted: float | None
    other: str = ""


QWEN, LLAMA = "qwen3-0.6b", "llama-3.1-8b"
SHARED = "shared prefix 64x4096"
TARGETS = (
    Target("decode attention, 1 GB", "decode llama 64x4096 b16", "bandwidth", 0.9, 0.9),
    Target("decode attention, 200 MB", "decode llama 32x1600 b16", "bandwidth", 0.85, 0.85),
    Target("extend 8k, paged", "extend llama 8k b16", "TFLOP/s", 400, 380),
    Target("extend 8k, contiguous", "extend llama 8k in order b128", "TFLOP/s", 400, 390),
    Target("KV write, 4k tokens", "write llama 4096 tokens", "bandwidth", 0.8, 0.8),
    Target("offline, 0.6B", f"{QWEN} offline 256", "ceiling", 0.7, 0.78),
    Target("offline, 0.6B, over vLLM", f"{QWEN} offline 256", "ratio", 1.1, 1.12, "vllm"),
    Target("offline, 8B", f"{LLAMA} offline 256", "ceiling", 0.8, 0.8),
    Target("offline, 8B, over vLLM", f"{LLAMA} offline 256", "ratio", 1.05, None, "vllm"),
    Target("decode 1x1024, 8B", f"{LLAMA} decode 1x1024", "ceiling", 0.85, 0.78),
    Target("64 after 4k, 8B, over no cascade", f"{LLAMA} {SHARED}", "ratio", 2.0, 2.5,
           f"{LLAMA} no cascade shared prefix"),
    Target("start to first token, 8B", f"{LLAMA} start", "seconds", 60, 45),
)  # fmt: skip


def outcome(target: Target, results: Results, vllm: Results) -> float | None:
    """Return the measured figure of a target, or None if a part of it was not measured."""
    result = results.get(target.name, {})
    if target.figure == "bandwidth":
        limit = results.get("limit copy", {}).get("gb_s")
        return result["gb_s"] / limit if limit and "gb_s" in result else None
    if target.figure == "seconds":
        seconds = result.get("first_token_s")
        return None if seconds is None else seconds + result.get("imports_s", 0.0)
    if target.figure == "ratio":
        others = vllm.get(target.name) if target.other == "vllm" else results.get(target.other)
        rates = [part.get("tokens_per_s") for part in (result, others or {})]
        return rates[0] / rates[1] if all(rates) else None
    return result.get("share" if target.figure == "ceiling" else "tflop_s")


def target_table(results: Results, vllm: Results) -> str:
    """Format all targets with their predictions and outcomes as a text table."""
    lines = [f"{'work':36}{'target':>10}{'predicted':>11}{'measured':>10}"]
    for target in TARGETS:
        measured = outcome(target, results, vllm)
        verdict = ""
        if measured is not None:
            at_most = target.figure == "seconds"
            met = measured <= target.target if at_most else measured >= target.target
            verdict = "  met" if met else "  missed"
        cells = [shown(target, value) for value in (target.target, target.predicted, measured)]
        lines.append(f"{target.work:36}{cells[0]:>10}{cells[1]:>11}{cells[2]:>10}{verdict}")
    return "\n".join(lines)


def shown(target: Target, value: float | None) -> str:
    """Format a value in the unit of the target's figure."""
    if value is None:
        return ""
    if target.figure in ("bandwidth", "ceiling"):
        return f"{value:.0%}"
    units = {"TFLOP/s": f"{value:.0f} TF/s", "seconds": f"{value:.0f} s"}
    return units.get(target.figure, f"{value:.2f}×")


def main() -> None:
    folder = Path(sys.argv[1])
    content = json.loads((folder / "results.json").read_text())
    results = {record["name"]: record for record in content["records"]} | content["engine"]
    beside = folder / "vllm_gpu.json"
    vllm = json.loads(beside.read_text())["results"] if beside.exists() else {}
    print(target_table(results, vllm))


if __name__ == "__main__":
    main()
