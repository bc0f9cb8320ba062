"""Summarises the records of a run as numbers, as JSON and as a table.

docs/benchmarking.md has the definitions.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

import msgspec
import numpy as np

from .stream import RequestRecord

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2e": "End-to-end latency",
}
"""Latencies by their names in a RequestRecord, with their titles."""


DRAFT_COUNTERS = (
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
)
"""Counters of speculative decoding, by the end of their names in vLLM."""


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution in milliseconds. `percentiles`, such as "p50", are interpolated linearly."""

    count: int
    mean: float
    percentiles: dict[str, float]


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """Completed requests per second that kept every bound of `slo_ms`, which is in milliseconds."""

    slo_ms: dict[str, float]
    good_requests: int
    requests_per_s: float


class ClientLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How busy this client was: if either number is high, it has also measured itself.

    `cpu_share` is its share of one core, `max_lag_ms` the longest delay of its event loop.
    """

    cpu_share: float
    max_lag_ms: float


class Drafts(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the tokens that the server drafted. `num_drafts` is None if it does not count
    drafts; `acceptance` is the share of their tokens that were right."""

    num_drafts: int | None
    draft_tokens: int
    accepted_tokens: int
    acceptance: float


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of one run.

    Tokens are as the server counted them. Rates count only completed requests, over `duration_s`:
    from the first request sent to the end of the last answer.
    """

    request_rate: float | Literal["inf"]
    seed: int
    num_requests: int
    completed: int
    errors: dict[str, int]
    error_examples: dict[str, str]
    duration_s: float
    peak_concurrency: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    wrong_lengths: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    latency_ms: dict[str, Distribution | None]
    goodput: Goodput | None
    client: ClientLoad
    server: dict[str, float]
    drafts: Drafts | None = None
    requests: list[RequestRecord] | None = None


class BenchResult(msgspec.Struct, frozen=True, kw_only=True):
    """The file that --save-result writes. `options` holds every flag with its default resolved."""

    date: str
    command: list[str]
    versions: dict[str, str]
    base_url: str
    endpoint: str
    model: str
    options: dict[str, Any]
    runs: list[RunReport]


class RunRecords(msgspec.Struct, frozen=True, kw_only=True):
    """The raw results of a run: a record for each request, and figures of client and server."""

    records: list[RequestRecord]
    duration_s: float
    peak_concurrency: int
    client: ClientLoad
    server: dict[str, float]


def values_ms(records: list[RequestRecord], metric: str) -> list[float]:
    """Return the metric in ms of each completed request that has it; for "itl", all their gaps."""
    completed = [record for record in records if record.error is None]
    if metric == "itl":
        return [gap * 1e3 for record in completed for gap in record.itls]
    found = (getattr(record, metric) for record in completed)
    return [value * 1e3 for value in found if value is not None]


def summarise(
    run: RunRecords,
    *,
    request_rate: float,
    seed: int,
    percentiles: list[float],
    slo_ms: dict[str, float],
    fixed_lengths: bool,
    detailed: bool,
) -> RunReport:
    """Return the numbers of a run.

    With `fixed_lengths`, answers of another length than asked for are counted as wrong. With
    `detailed`, the report holds the records.
    """
    completed = [record for record in run.records if record.error is None]
    prompt_tokens = sum(record.prompt_tokens for record in completed)
    output_tokens = sum(record.output_tokens for record in completed)
    cached = [record.cached_tokens for record in completed if record.cached_tokens is not None]
    errors = Counter(record.error for record in run.records if record.error is not None)
    seconds = run.duration_s
    return RunReport(
        request_rate="inf" if math.isinf(request_rate) else request_rate,
        seed=seed,
        num_requests=len(run.records),
        completed=len(completed),
        errors=dict(errors),
        error_examples={
            record.error: record.error_message or ""
            for record in reversed(run.records)
            if record.error is not None
        },
        duration_s=seconds,
        peak_concurrency=run.peak_concurrency,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        cached_tokens=sum(cached) if cached else None,
        wrong_lengths=_wrong_lengths(completed) if fixed_lengths else 0,
        requests_per_s=len(completed) / seconds,
        output_tokens_per_s=output_tokens / seconds,
        total_tokens_per_s=(prompt_tokens + output_tokens) / seconds,
        latency_ms={
            name: _distribution(values_ms(completed, name), percentiles) for name in METRICS
        },
        goodput=_goodput(completed, slo_ms, seconds) if slo_ms else None,
        client=run.client,
        server=run.server,
        drafts=_drafts(run.server, completed),
        requests=run.records if detailed else None,
    )


def _drafts(server: dict[str, float], completed: list[RequestRecord]) -> Drafts | None:
    """Return what the server's counters say of drafts, or else its answers; None if neither does,
    or if there were none."""
    number: int | None = None
    if all(name in server for name in DRAFT_COUNTERS):
        number, tokens, accepted = (int(server[name]) for name in DRAFT_COUNTERS)
    else:
        tokens = sum(record.draft_tokens or 0 for record in completed)
        accepted = sum(record.accepted_draft_tokens or 0 for record in completed)
    if not tokens:
        return None
    return Drafts(
        num_drafts=number,
        draft_tokens=tokens,
        accepted_tokens=accepted,
        acceptance=accepted / tokens,
    )


def _wrong_lengths(completed: list[RequestRecord]) -> int:
    return sum(
        record.output_tokens != record.requested_output_tokens * record.num_choices
        for record in completed
    )


def _distribution(values: list[float], percentiles: list[float]) -> Distribution | None:
    if not values:
        return None
    return Distribution(
        count=len(values),
        mean=float(np.mean(values)),
        percentiles={f"p{p:g}": float(np.percentile(values, p)) for p in percentiles},
    )


def _goodput(completed: list[RequestRecord], slo_ms: dict[str, float], seconds: float) -> Goodput:
    def keeps(record: RequestRecord) -> bool:
        # An answer of one token has no TPOT, so it cannot miss that bound.
        values = ((getattr(record, name), bound) for name, bound in slo_ms.items())
        return all(value is None or value * 1e3 <= bound for value, bound in values)

    good = sum(keeps(record) for record in completed)
    return Goodput(slo_ms=slo_ms, good_requests=good, requests_per_s=good / seconds)


# -- The table -------------------------------------------------------------------------------


def table(report: RunReport) -> str:
    """Return the text that is printed after a run."""
    rate = report.request_rate
    rows: list[tuple[str, str]] = [
        ("Request rate offered (1/s)", rate if isinstance(rate, str) else f"{rate:g}"),
        ("Completed requests", f"{report.completed} of {report.num_requests}"),
        *((f"  failed: {kind}", str(count)) for kind, count in report.errors.items()),
        ("Duration (s)", f"{report.duration_s:.2f}"),
        ("Maximum concurrent requests", str(report.peak_concurrency)),
        ("Prompt tokens", str(report.prompt_tokens)),
        ("  found in the prefix cache", _share(report.cached_tokens, report.prompt_tokens)),
        ("Output tokens", str(report.output_tokens)),
        ("Requests/s", f"{report.requests_per_s:.3f}"),
        ("Output tokens/s", f"{report.output_tokens_per_s:.1f}"),
        ("Total tokens/s", f"{report.total_tokens_per_s:.1f}"),
    ]
    if report.goodput is not None:
        bounds = ", ".join(
            f"{name} ≤ {bound:g} ms" for name, bound in report.goodput.slo_ms.items()
        )
        rows.append((f"Goodput (requests/s; {bounds})", f"{report.goodput.requests_per_s:.3f}"))
    if report.drafts is not None:
        drafts = report.drafts
        rows.append(("Drafted tokens", str(drafts.draft_tokens)))
        rows.append(("  accepted", _share(drafts.accepted_tokens, drafts.draft_tokens)))
        if drafts.num_drafts:
            mean = drafts.accepted_tokens / drafts.num_drafts
            rows.append(("  accepted in each of the drafts", f"{mean:.2f} of {drafts.num_drafts}"))
    rows += [
        (f"Server: {name}", f"{value:g}")
        for name, value in report.server.items()
        if name not in DRAFT_COUNTERS
    ]
    lines = [f"{name:<52} {value:>26}" for name, value in rows]
    return "\n".join([*lines, "", *_latency_lines(report)])


def _latency_lines(report: RunReport) -> list[str]:
    found = [distribution for distribution in report.latency_ms.values() if distribution]
    names = ["mean", *(found[0].percentiles if found else ())]
    lines = [f"{'Latency (ms)':<30}" + "".join(f"{name:>12}" for name in names)]
    for metric, title in METRICS.items():
        distribution = report.latency_ms[metric]
        values = (
            ["–"] * len(names)
            if distribution is None
            else [f"{v:.2f}" for v in (distribution.mean, *distribution.percentiles.values())]
        )
        label = f"{title} ({'E2E' if metric == 'e2e' else metric.upper()})"
        lines.append(f"{label:<30}" + "".join(f"{value:>12}" for value in values))
    return lines


def _share(part: int | None, whole: int) -> str:
    return "not reported" if part is None else f"{part} ({part / max(1, whole):.1%})"


def warnings(report: RunReport) -> list[str]:
    """Return what a reader must know before trusting the numbers."""
    found = [
        f"{count} requests failed with {kind}: {report.error_examples[kind]}"
        for kind, count in report.errors.items()
    ]
    if report.wrong_lengths:
        found.append(
            f"{report.wrong_lengths} answers are not as long as asked for: the server does not "
            "follow ignore_eos, so lengths differ between servers"
        )
    if report.client.cpu_share > 0.8 or report.client.max_lag_ms > 100:
        found.append(
            f"this client used {report.client.cpu_share:.0%} of a core and its event loop was up "
            f"to {report.client.max_lag_ms:.0f} ms late: it has also measured itself"
        )
    return found
