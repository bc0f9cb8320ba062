"""`quire bench`: a client that measures any OpenAI-compatible server, and the engine alone."""

from __future__ import annotations

import argparse
import math
import os
import platform
import resource
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from ...engine.bench.arguments import add_latency_arguments, add_throughput_arguments
from ...engine.bench.commands import run_latency, run_throughput
from ...engine.errors import ConfigurationError, QuireError, StartupError
from .arguments import add_serve_arguments, check_arguments
from .dataset import DatasetOptions, Workload, arrival_times, build_workload
from .http import HttpClient
from .load import LoadGenerator, ask
from .plot import write_plot
from .report import BenchResult, RunRecords, RunReport, summarise, table, warnings

WARMUP_SEED = 1_000_003  # added to the seed: warm-up prompts are none of the measured ones


def add_parser(commands: Any) -> None:
    """`bench` with its three commands, each of which sets `run(arguments) -> exit code`."""
    bench = commands.add_parser(
        "bench", help="measure a server or the engine alone", allow_abbrev=False
    )
    kinds = bench.add_subparsers(required=True, metavar="COMMAND")
    demo = str(files("quire.configs") / "demo")
    serve = kinds.add_parser(
        "serve",
        help="measure any OpenAI-compatible server over HTTP",
        description="Measure any OpenAI-compatible server over HTTP. The key, if it needs one, "
        "is read from OPENAI_API_KEY.",
        allow_abbrev=False,
    )
    add_serve_arguments(serve)
    serve.set_defaults(run=run_serve)
    throughput = kinds.add_parser(
        "throughput", help="many requests at once, the engine alone", allow_abbrev=False
    )
    add_throughput_arguments(throughput, demo)
    throughput.set_defaults(run=run_throughput)
    latency = kinds.add_parser(
        "latency", help="one batch, repeated, the engine alone", allow_abbrev=False
    )
    add_latency_arguments(latency, demo)
    latency.set_defaults(run=run_latency)


def run(arguments: argparse.Namespace) -> int:
    """The exit code: 0, 1 where it failed, which is said in one line, 130 for an interrupt."""
    try:
        return int(arguments.run(arguments))
    except QuireError as error:
        print(f"quire: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run_serve(arguments: argparse.Namespace) -> int:
    """0 where requests completed, 1 where none did. Raises StartupError."""
    check_arguments(arguments)
    # A socket for each request under way: the default limit of 1024 would show as errors.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    result, last = uvloop.run(measure(arguments))
    if arguments.save_result or arguments.result_filename:
        path = arguments.result_filename or Path(f"bench-{datetime.now():%Y%m%d-%H%M%S}.json")
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
        print(f"result: {path}")
    if arguments.plot:
        write_plot(arguments.plot, result, last)
        print(f"plot: {arguments.plot}")
    return 0 if any(run.completed for run in result.runs) else 1


async def measure(arguments: argparse.Namespace) -> tuple[BenchResult, RunRecords]:
    """Warm up, run once or at every rate of the sweep, print each run's table."""
    a = arguments
    client = make_client(a.base_url)
    try:
        model = a.model or await _first_model(client)
        vocab_size = await _vocab_size(client, a)
        options = dataset_options(a, vocab_size)
        fields = {"temperature": a.temperature, **({"ignore_eos": True} if a.ignore_eos else {})}
        generator = LoadGenerator(
            client,
            a.endpoint,
            model,
            n=a.n,
            fields=fields,
            timeout=a.request_timeout,
            max_concurrency=a.max_concurrency,
        )
        await _warm_up(generator, options, a.num_warmups)
        runs: list[RunReport] = []
        for index, rate in enumerate(a.sweep or [a.request_rate or math.inf]):
            # Prompts of its own for each rate: none may profit from the one before.
            seed = a.seed + index
            records = await _run_once(generator, options._replace(seed=seed), rate, a)
            report = summarise(
                records,
                request_rate=rate,
                seed=seed,
                percentiles=a.percentiles,
                slo_ms=dict(a.goodput),
                fixed_lengths=a.ignore_eos,
                detailed=a.save_detailed,
            )
            runs.append(report)
            print(table(report))
            for warning in warnings(report):
                print(f"warning: {warning}", file=sys.stderr)
            if len(runs) < len(a.sweep or ()):
                print()
        server_version = await _get(client, "/version")
    finally:
        client.close()
    shown = {"sweep", "request_rate", "vocab_size", "run", "command"}
    result = BenchResult(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=sys.argv,
        versions={
            "quire": version("quire"),
            "python": platform.python_version(),
            "server": str((server_version or {}).get("version", "not reported")),
        },
        base_url=a.base_url,
        endpoint=a.endpoint,
        model=model,
        options={
            "sweep": a.sweep,
            "vocab_size": vocab_size,
            **{
                name: str(value) if isinstance(value, Path) else value
                for name, value in vars(a).items()
                if name not in shown
            },
        },
        runs=runs,
    )
    return result, records


def make_client(base_url: str) -> HttpClient:
    """`base_url` with or without the /v1 that OpenAI's clients want at its end."""
    headers = {"content-type": "application/json", "user-agent": "quire-bench"}
    key = os.environ.get("OPENAI_API_KEY")
    if key:
        headers["authorization"] = f"Bearer {key}"
    try:
        return HttpClient(base_url.rstrip("/").removesuffix("/v1"), headers)
    except ValueError as error:
        raise ConfigurationError(f"--base-url: {error}") from error


def dataset_options(arguments: argparse.Namespace, vocab_size: int | None) -> DatasetOptions:
    a = arguments
    return DatasetOptions(
        name=a.dataset_name,
        num_prompts=a.num_prompts,
        input_len=a.random_input_len,
        output_len=a.random_output_len,
        range_ratio=a.random_range_ratio,
        prefix_len=a.prefix_len,
        trace_file=a.trace_file,
        vocab_size=vocab_size,
        seed=a.seed,
    )


async def _run_once(
    generator: LoadGenerator, options: DatasetOptions, rate: float, arguments: argparse.Namespace
) -> RunRecords:
    workload = build_workload(options)
    if workload.arrivals is not None and not math.isinf(rate):
        raise ConfigurationError("the trace has arrivals of its own: drop --request-rate, --sweep")
    texts_only = arguments.endpoint != "/v1/completions"
    if texts_only and any(isinstance(request.prompt, list) for request in workload.requests):
        raise ConfigurationError("the trace has prompts of token ids, which a chat does not take")
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
    """None where prompts are to be text."""
    if arguments.endpoint != "/v1/completions" or arguments.vocab_size is not None:
        found: int | None = arguments.vocab_size
        return found
    size = (await _get(client, "/tokenizer_info") or {}).get("vocab_size")
    if isinstance(size, int):
        return size
    print("the server tells no vocabulary size: prompts are random words (or give --vocab-size)")
    return None


async def _get(client: HttpClient, path: str) -> dict[str, Any] | None:
    """The JSON object there; None where the server has none."""
    answer = await ask(client, path)
    if answer.status in (401, 403):
        raise StartupError("the server wants another key: set OPENAI_API_KEY")
    try:
        found = msgspec.json.decode(answer.body)
    except msgspec.DecodeError:
        return None
    return found if answer.status == 200 and isinstance(found, dict) else None
