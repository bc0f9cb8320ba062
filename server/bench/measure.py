"""A benchmark of a server: warm up, run at each rate, print each run's table."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from ...engine.errors import ConfigurationError, StartupError
from ..about import quire_version
from .dataset import DatasetOptions, Workload, arrival_times, build_workload, dataset_options
from .http import HttpClient
from .load import LoadGenerator, ask
from .report import BenchResult, RunRecords, RunReport, summarise, table, warnings

WARMUP_SEED = 1_000_003
"""Added to the seed, so that the prompts of the warm-up are not among the measured ones."""
NOT_SAVED = frozenset({"sweep", "request_rate", "vocab_size", "run", "command"})
"""Arguments that the result does not list as given: it has them elsewhere, or resolved."""


async def measure(arguments: argparse.Namespace) -> tuple[BenchResult, RunRecords]:
    """Run once, or at every rate of the sweep, and print each run's table.

    Returns the result and the records of the last run. Raises StartupError if the server does not
    answer or a warm-up request fails.
    """
    a = arguments
    client = make_client(a.base_url)
    try:
        model = a.model or await _first_model(client)
        vocab_size = await _vocab_size(client, a)
        options = dataset_options(a, vocab_size)
        generator = LoadGenerator(
            client,
            a.endpoint,
            model,
            n=a.n,
            fields={"temperature": a.temperature, **({"ignore_eos": True} if a.ignore_eos else {})},
            timeout=a.request_timeout,
            max_concurrency=a.max_concurrency,
        )
        print(
            f"{model} at {a.base_url}, {a.endpoint}: {a.num_prompts} requests, {a.dataset_name}\n"
        )
        await _warm_up(generator, options, a.num_warmups)
        runs: list[RunReport] = []
        for index, rate in enumerate(a.sweep or [a.request_rate or math.inf]):
            # Each rate has prompts of its own, so that none profits from the cache of another.
            options = options._replace(seed=a.seed + index)
            records = await _run_once(generator, options, rate, a)
            runs.append(_report(records, rate, options.seed, a))
            if len(runs) < len(a.sweep or ()):
                print()
        server_version = await _get(client, "/version")
    finally:
        await client.close()
    return _result(a, model, vocab_size, server_version, runs), records


def _report(records: RunRecords, rate: float, seed: int, a: argparse.Namespace) -> RunReport:
    """Summarise a run, and print its table and warnings."""
    report = summarise(
        records,
        request_rate=rate,
        seed=seed,
        percentiles=a.percentiles,
        slo_ms=dict(a.goodput),
        fixed_lengths=a.ignore_eos,
        detailed=a.save_detailed,
    )
    print(table(report))
    for warning in warnings(report):
        print(f"warning: {warning}", file=sys.stderr)
    return report


def _result(
    arguments: argparse.Namespace,
    model: str,
    vocab_size: int | None,
    server_version: dict[str, Any] | None,
    runs: list[RunReport],
) -> BenchResult:
    given = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in NOT_SAVED
    }
    return BenchResult(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=sys.argv,
        versions={
            "quire": quire_version(),
            "python": platform.python_version(),
            "server": str((server_version or {}).get("version", "not reported")),
        },
        base_url=arguments.base_url,
        endpoint=arguments.endpoint,
        model=model,
        options={"sweep": arguments.sweep, "vocab_size": vocab_size, **given},
        runs=runs,
    )


def make_client(base_url: str) -> HttpClient:
    """Return a client for `base_url`, which may end with the /v1 that OpenAI's clients want.

    It sends the key in OPENAI_API_KEY, if there is one. Raises ConfigurationError for a bad URL.
    """
    headers = {"content-type": "application/json", "user-agent": "quire-bench"}
    key = os.environ.get("OPENAI_API_KEY")
    if key:
        headers["authorization"] = f"Bearer {key}"
    try:
        return HttpClient(base_url.rstrip("/").removesuffix("/v1"), headers)
    except ValueError as error:
        raise ConfigurationError(f"--base-url: {error}") from error


async def _run_once(
    generator: LoadGenerator, options: DatasetOptions, rate: float, arguments: argparse.Namespace
) -> RunRecords:
    workload = build_workload(options)
    if workload.arrivals is not None and not math.isinf(rate):
        raise ConfigurationError(
            "the trace has arrivals of its own: drop --request-rate and --sweep"
        )
    texts_only = arguments.endpoint != "/v1/completions"
    if texts_only and any(isinstance(request.prompt, list) for request in workload.requests):
        raise ConfigurationError("the trace has prompts of token ids, which a chat cannot take")
    arrivals = workload.arrivals or arrival_times(
        len(workload.requests), rate, arguments.burstiness, options.seed
    )
    return await generator.run(workload, arrivals, "inf" if math.isinf(rate) else f"{rate:g}/s")


async def _warm_up(generator: LoadGenerator, options: DatasetOptions, count: int) -> None:
    if not count:
        return
    options = options._replace(num_prompts=count, seed=options.seed + WARMUP_SEED)
    if options.name == "trace":
        options = options._replace(name="random")
    workload: Workload = build_workload(options)
    run = await generator.run(workload, [0.0] * count, "warm-up")
    for record in run.records:
        if record.error is not None:
            raise StartupError(f"a warm-up request failed: {record.error}: {record.error_message}")


async def _first_model(client: HttpClient) -> str:
    answer = await _get(client, "/v1/models")
    try:
        return str(answer["data"][0]["id"])  # type: ignore[index]
    except (TypeError, KeyError, IndexError) as error:
        raise StartupError("the server lists no models at /v1/models: give --model") from error


async def _vocab_size(client: HttpClient, arguments: argparse.Namespace) -> int | None:
    """Return the size of the vocabulary, or None if prompts must be text."""
    if arguments.endpoint != "/v1/completions" or arguments.vocab_size is not None:
        found: int | None = arguments.vocab_size
        return found
    size = (await _get(client, "/tokenizer_info") or {}).get("vocab_size")
    if isinstance(size, int):
        return size
    print(
        "the server does not report its vocabulary size, so prompts are random words; give "
        "--vocab-size for token ids"
    )
    return None


async def _get(client: HttpClient, path: str) -> dict[str, Any] | None:
    """Return the JSON object at this path, or None if the server has none."""
    answer = await ask(client, path)
    if answer.status in (401, 403):
        raise StartupError("the server refuses the key: set OPENAI_API_KEY")
    try:
        found = msgspec.json.decode(answer.body)
    except msgspec.DecodeError:
        return None
    return found if answer.status == 200 and isinstance(found, dict) else None
