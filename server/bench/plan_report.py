"""What a plan says: each layout's capacity, what breaks first, and what losing an engine costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...engine.plan.calibration import Calibration
from ...engine.plan.capacity import Bound, Capacity, highest_rate, limit_of
from ...engine.plan.front import Front, FrontSource
from ...engine.plan.layout import Hardware, Layout, Source, WorkloadAt, runner
from ...engine.plan.planned_engine import MessageTimes
from ...engine.plan.planned_fleet import FleetRun
from ...engine.plan.serving import ServingTimes
from .plot import Panel, Series

CURVE = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
"""Shares of a layout's highest rate at which the plot has points."""
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayout:
    """The plan of one layout. `at_rate` is its run at the rate that is asked for, `limit` says what
    runs out first beyond its capacity, and `without_one` is its capacity with an engine less, or
    None if it has only one. `curve` has runs at several rates, for the plot."""

    layout: Layout
    source: Source
    capacity: Capacity
    limit: str
    at_rate: FleetRun | None
    without_one: Capacity | None
    curve: list[tuple[float, FleetRun]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plans of all layouts for one load. `error` is that of the calibration's fit, and
    `stretch` says how many times as long as alone steps take in a server, if that was measured."""

    model: str
    device: str
    error: float | None
    stretch: float | None
    front: Front
    front_source: FrontSource
    bounds: tuple[Bound, ...]
    rate: float | None
    layouts: list[PlannedLayout]


# Over 50 lines: half of them are the arguments and the fields of the result.
def make_plan(
    model: str,
    hardware: Hardware,
    layouts: Sequence[Layout],
    bounds: tuple[Bound, ...],
    rate: float | None,
    workload_at: WorkloadAt,
    front: Front,
    front_source: FrontSource,
    *,
    progress: Callable[[str], None] = lambda text: None,
    with_curve: bool = True,
) -> Plan:
    """Plan every layout. Raises ConfigurationError if one is not possible."""
    engines = {layout: hardware.engine(layout.tp) for layout in layouts}  # refuses all at once
    known: dict[Layout, Capacity] = {}

    def capacity_of(layout: Layout) -> Capacity:
        if layout not in known:
            progress(f"planning {layout}")
            run_at = runner(hardware, layout, workload_at, front)
            start = rate or 1.0 * layout.replicas
            known[layout] = highest_rate(run_at, bounds, start)
        return known[layout]

    planned = []
    for layout in layouts:
        capacity = capacity_of(layout)
        run_at = runner(hardware, layout, workload_at, front)
        without = None
        if layout.replicas > 1:
            without = capacity_of(layout._replace(replicas=layout.replicas - 1))
        limit = ""
        if capacity.beyond is not None:
            limit = limit_of(capacity.beyond, hardware.shape.max_num_batched_tokens)
        points = [share * capacity.rate for share in CURVE] if with_curve and capacity.rate else []
        planned.append(
            PlannedLayout(
                layout=layout,
                source=engines[layout].source,
                capacity=capacity,
                limit=limit,
                at_rate=run_at(rate) if rate is not None else None,
                without_one=without,
                curve=[(at, run_at(at)) for at in points],
            )
        )
    progress("")
    calibration = hardware.calibration
    return Plan(
        model=model,
        device=calibration.device if calibration else "",
        error=calibration.mean_error if calibration else None,
        stretch=calibration.serving.stretch if calibration and calibration.serving else None,
        front=front,
        front_source=front_source,
        bounds=bounds,
        rate=rate,
        layouts=planned,
    )


def render(plan: Plan, workload: str) -> str:
    """Return the plan as text for a terminal."""
    sources = {one.source for one in plan.layouts}
    times = ", ".join(sorted(sources))
    if plan.error is not None:
        times += f" ({plan.error:.1%} error of the fit)"
    if plan.stretch is not None:
        times += f", {plan.stretch:.2f} times as long in a server"
    goal = ", ".join(map(str, plan.bounds)) or "that requests do not pile up"
    lines = [f"{plan.model} · {workload} · step times: {times}", _front(plan), f"goal: {goal}", ""]
    head = ("tp × engines", "GPUs", "max req/s", "TTFT p50/p90/p99", "ITL p50/p99", "tok/s/GPU")
    rows: list[tuple[str, ...]] = [(*head, "KV used", "cached", "preempted")]
    rows += [_row(one) for one in plan.layouts]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(" ".join(["", *cells]).rstrip())
    lines.append("")
    for one in plan.layouts:
        lines += _remarks(one, plan)
    lines += _verdict(plan)
    return "\n".join(lines)


def _front(plan: Plan) -> str:
    times, workers = plan.front
    if plan.front_source == "left out":
        return "HTTP: left out (calibrate with --http, or give --front-ms and --front-output-ms)"
    processes = "1 process" if workers == 1 else f"{workers} processes"
    return (
        f"HTTP: {plan.front_source}, {processes}; ms for each request {times.request * 1e3:.2f} "
        f"(and {times.latency * 1e3:.2f} on its way), step {times.message * 1e3:.3f}, output "
        f"{times.output * 1e3:.3f}"
    )


def describe_calibration(calibration: Calibration) -> str:
    """Return what was measured, as lines for a terminal."""
    times = calibration.times
    lines = [
        f"{len(calibration.points)} kinds of steps of {calibration.model} on "
        f"{calibration.device}, {calibration.dtype}",
        f"launch and weights {times.base * 1e3:.3f} ms; µs for each token {times.token * 1e6:.2f} "
        f"(and {times.over * 1e6:.2f} beyond {times.knee}), row {times.row * 1e6:.2f}, token of "
        f"context {times.context * 1e6:.4f}, pair of a chunk {times.pair * 1e6:.5f}, token that "
        f"the step before had more {times.cold * 1e6:.3f}",
        f"the fit is off by {calibration.mean_error:.1%} on average, {calibration.max_error:.1%} "
        "at most",
        _messages(calibration.messages),
    ]
    if calibration.serving is not None:
        lines += _serving(calibration.serving)
    return "\n".join(lines)


def _messages(times: MessageTimes) -> str:
    return (
        f"messages: {times.step * 1e6:.0f} µs between two steps, {times.request * 1e6:.0f} µs for "
        "each request that is read there"
    )


def _serving(times: ServingTimes) -> list[str]:
    lines = [
        f"in a server, steps take {times.stretch:.3f} times as long; a request is "
        f"{times.http.latency * 1e3:.2f} ms on its way"
    ]
    for name, one in (("HTTP", times.http), ("the client", times.client)):
        lines.append(
            f"{name}: µs for each request {one.request * 1e6:.0f}, token of its prompt "
            f"{one.prompt_token * 1e6:.2f}, step {one.message * 1e6:.0f}, output "
            f"{one.output * 1e6:.1f}"
        )
    lines.append(f"the fit of HTTP's times is off by {times.error:.1%} on average")
    return lines


def _row(one: PlannedLayout) -> tuple[str, ...]:
    run = one.capacity.run
    name, gpus = str(one.layout), str(one.layout.gpus)
    if run is None:
        return (name, gpus, "0", "–", "–", "–", "–", "–", "–")
    ttft = "/".join(f"{run.percentile('ttft', p) * 1e3:.0f}" for p in PERCENTILES) + " ms"
    itl = "/".join(f"{run.percentile('itl', p) * 1e3:.1f}" for p in (50, 99)) + " ms"
    return (
        *(name, gpus, f"{one.capacity.rate:.3g}", ttft, itl),
        f"{run.output_tokens_per_s / one.layout.gpus:.0f}",
        f"{run.peak_kv_usage:.0%}",
        f"{run.cached_tokens / run.prompt_tokens:.0%}",
        f"{run.preemptions / len(run.e2e):.1%}",
    )


def _remarks(one: PlannedLayout, plan: Plan) -> list[str]:
    capacity = one.capacity
    found = []
    if capacity.beyond is not None:
        broken = ", ".join(capacity.broken)
        found.append(f"beyond it {broken} breaks; runs out first: {one.limit}")
    if one.without_one is not None:
        found.append(f"one engine lost: {one.without_one.rate:.3g} req/s")
    run = capacity.run or capacity.beyond
    if run is not None:
        parts = sorted(run.busy_by_part.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{share:.0%} {part}" for part, share in parts if share >= 0.005)
        busy = f"engines are busy {run.busy_share:.0%} of the time"
        if plan.front_source != "left out":
            busy += f", HTTP {run.front_busy_share:.0%}"
        found.append(f"a step is {shares}; {busy}")
    if one.at_rate is not None and plan.rate is not None:
        at = one.at_rate
        found.append(
            f"at {plan.rate:g} req/s: TTFT p50 {at.percentile('ttft', 50) * 1e3:.0f} ms, ITL p99 "
            f"{at.percentile('itl', 99) * 1e3:.1f} ms, {at.output_tokens_per_s:.0f} tok/s"
        )
    return [f" {one.layout}: {text}" for text in found]


def _verdict(plan: Plan) -> list[str]:
    if plan.rate is None:
        return []
    enough = [one for one in plan.layouts if one.capacity.rate >= plan.rate]
    if not enough:
        return ["", f"no layout serves {plan.rate:g} req/s within the goal"]
    best = min(enough, key=lambda one: (one.layout.gpus, -one.capacity.rate))
    spare = "and still does with one engine less" if _survives(best, plan.rate) else "without spare"
    return ["", f"{best.layout} serves {plan.rate:g} req/s within the goal, {spare}"]


def _survives(one: PlannedLayout, rate: float) -> bool:
    return one.without_one is not None and one.without_one.rate >= rate


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values. Times are in milliseconds."""
    return {
        "model": plan.model,
        "device": plan.device or None,
        "fit_error": plan.error,
        "stretch": plan.stretch,
        "front": {
            "source": plan.front_source,
            "processes": plan.front.workers,
            "ms": {name: 1e3 * seconds for name, seconds in asdict(plan.front.times).items()},
        },
        "bounds": [str(bound) for bound in plan.bounds],
        "rate": plan.rate,
        "layouts": [
            {
                "tensor_parallel_size": one.layout.tp,
                "replicas": one.layout.replicas,
                "gpus": one.layout.gpus,
                "step_times": one.source,
                "max_requests_per_s": one.capacity.rate,
                "at_max": _run(one.capacity.run),
                "broken_beyond": one.capacity.broken,
                "runs_out_first": one.limit or None,
                "at_rate": _run(one.at_rate),
                "max_requests_per_s_without_one": one.without_one and one.without_one.rate,
            }
            for one in plan.layouts
        ],
    }


def _run(run: FleetRun | None) -> dict[str, Any] | None:
    if run is None:
        return None
    latencies = {
        f"{metric}_ms": {f"p{p}": run.percentile(metric, p) * 1e3 for p in PERCENTILES}
        for metric in ("ttft", "itl", "e2e")
    }
    return {
        **latencies,
        "requests_per_s": run.requests_per_s,
        "output_tokens_per_s": run.output_tokens_per_s,
        "cached_share": run.cached_tokens / run.prompt_tokens,
        "preemptions": run.preemptions,
        "peak_kv_usage": run.peak_kv_usage,
        "busy_share": run.busy_share,
        "busy_by_part": run.busy_by_part,
        "front_busy_share": run.front_busy_share,
    }


def panels(plan: Plan) -> list[Panel]:
    """Return plots over the offered rate, with a curve for each layout."""

    def curves(value: Callable[[FleetRun], float]) -> list[Series]:
        return [
            Series(str(one.layout), [(rate, value(run)) for rate, run in one.curve])
            for one in plan.layouts
        ]

    offered = "requests/s offered"
    return [
        Panel("Time to first token, p50", offered, "ms", curves(_ms("ttft", 50))),
        Panel("Time to first token, p99", offered, "ms", curves(_ms("ttft", 99))),
        Panel("Inter-token latency, p99", offered, "ms", curves(_ms("itl", 99))),
        Panel("Output tokens", offered, "tokens/s", curves(lambda run: run.output_tokens_per_s)),
    ]


def _ms(metric: str, percent: int) -> Callable[[FleetRun], float]:
    return lambda run: run.percentile(metric, percent) * 1e3
