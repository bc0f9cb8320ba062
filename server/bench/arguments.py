"""The flags of `quire bench serve`, named as in vLLM's client, and which of them go together."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import get_args

from ...engine.bench.arguments import check_writable, positive_int
from ...engine.errors import ConfigurationError
from .dataset import DEFAULT_LENGTHS, DatasetName, Endpoint
from .plot import check_plot_path

SLO_METRICS = {"ttft": "ttft", "tpot": "tpot", "e2el": "e2e"}
"""Metrics that --goodput takes, and their names in a RequestRecord."""


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `quire bench serve`."""
    server = parser.add_argument_group("Server").add_argument
    server(
        "--base-url",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="Server, with or without /v1. (default: http://127.0.0.1:8000)",
    )
    server("--model", metavar="NAME", help="Default: the first model that the server lists.")
    server(
        "--endpoint",
        choices=get_args(Endpoint),
        default="/v1/completions",
        help="(default: /v1/completions)",
    )
    server(
        "--request-timeout",
        type=_positive,
        default=1200.0,
        metavar="S",
        help="Seconds after which a request counts as failed. (default: 1200)",
    )
    add_request_arguments(parser)
    load = parser.add_argument_group("Load").add_argument
    load("--request-rate", type=_positive, metavar="R", help="Requests/s. Default: all at once.")
    load(
        "--burstiness",
        type=_positive,
        default=1.0,
        metavar="K",
        help="1 is a Poisson process; below 1, requests come in bursts. (default: 1)",
    )
    load("--max-concurrency", type=positive_int, metavar="N", help="Maximum requests at once.")
    load(
        "--num-warmups",
        type=_count,
        default=1,
        metavar="N",
        help="Requests before the clock starts. (default: 1)",
    )
    load("--sweep", type=_rates, metavar="R,R,…", help="One run at each of these request rates.")
    _add_result_arguments(parser)


def add_request_arguments(parser: argparse.ArgumentParser, num_prompts: int = 100) -> None:
    """Add the flags that decide prompts, lengths and arrivals."""
    group = parser.add_argument_group("Requests")
    data = group.add_argument
    data(
        "--dataset-name",
        choices=get_args(DatasetName),
        default="random",
        help="Kind of prompts. (default: random)",
    )
    text = f"(default: {num_prompts})"
    data("--num-prompts", type=positive_int, default=num_prompts, metavar="N", help=text)
    _add_length_arguments(group)
    data(
        "--n",
        type=positive_int,
        metavar="N",
        help="Choices per request. (default: 1; for n-sampling 8)",
    )
    data(
        "--trace-file",
        type=Path,
        metavar="FILE",
        help="JSONL for trace: prompt or prompt_len, output_len, arrival.",
    )
    data(
        "--vocab-size",
        type=positive_int,
        metavar="N",
        help="Prompts are token ids below this. Default: what the server reports.",
    )
    data("--temperature", type=float, metavar="T", help="Default: 0, or 1 if n > 1.")
    data(
        "--seed",
        type=_count,
        default=0,
        metavar="N",
        help="Decides prompts, lengths and arrivals. (default: 0)",
    )


def _add_length_arguments(group: argparse._ArgumentGroup) -> None:
    data = group.add_argument
    data(
        "--random-input-len",
        type=positive_int,
        metavar="N",
        help="Prompt tokens; the mean for lognormal.",
    )
    data(
        "--random-output-len",
        type=positive_int,
        metavar="N",
        help="Output tokens of each choice; the mean for lognormal.",
    )
    data(
        "--random-range-ratio",
        type=float,
        metavar="R",
        help="Lengths are uniform in length · (1 ± R). (default: 0)",
    )
    data(
        "--prefix-len",
        type=positive_int,
        metavar="N",
        help="Tokens of the prefix of shared-prefix. (default: 2048)",
    )
    data(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="Make answers as long as asked for. (default: on, off for trace)",
    )


def _add_result_arguments(parser: argparse.ArgumentParser) -> None:
    out = parser.add_argument_group("Results").add_argument
    out(
        "--goodput",
        nargs="+",
        type=_slo,
        default=[],
        metavar="METRIC:MS",
        help="Count the requests within these bounds on ttft, tpot or e2el.",
    )
    out(
        "--percentiles",
        type=_percentiles,
        default=[50.0, 95.0, 99.0],
        metavar="P,P,…",
        help="(default: 50,95,99)",
    )
    out(
        "--save-result",
        action="store_true",
        help="Write the result as JSON, to bench-DATE.json by default.",
    )
    out(
        "--result-filename",
        type=Path,
        metavar="FILE",
        help="Name of that file; implies --save-result.",
    )
    out("--save-detailed", action="store_true", help="Include every request in the result.")
    out("--plot", type=Path, metavar="FILE", help="Write a plot, as .html or .svg.")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other flags.

    Raises ConfigurationError for flags that do not go together, and for files that cannot be
    written.
    """

    def refuse(wrong: bool, message: str) -> None:
        if wrong:
            raise ConfigurationError(message)

    a, name = arguments, arguments.dataset_name
    trace = name == "trace"
    lengths = (a.random_input_len, a.random_output_len, a.random_range_ratio)
    refuse(trace != (a.trace_file is not None), "--trace-file and --dataset-name trace go together")
    refuse(trace and lengths != (None,) * 3, "a trace has its own lengths: drop --random-*")
    refuse(
        name == "lognormal" and a.random_range_ratio is not None,
        "--random-range-ratio is for uniform lengths, not for lognormal ones",
    )
    refuse(
        a.prefix_len is not None and name != "shared-prefix",
        "--prefix-len needs --dataset-name shared-prefix",
    )
    refuse(
        a.vocab_size is not None and a.endpoint != "/v1/completions",
        "--vocab-size is for prompts of token ids, which only /v1/completions takes",
    )
    refuse(
        a.sweep is not None and a.request_rate is not None,
        "give --sweep or --request-rate, not both",
    )
    if a.random_range_ratio is None:
        a.random_range_ratio = 0.0
    refuse(not 0 <= a.random_range_ratio < 1, "--random-range-ratio must be from 0 to below 1")
    if a.plot:
        check_plot_path(a.plot)
    check_writable(a.plot, a.result_filename)
    input_len, output_len = DEFAULT_LENGTHS.get(name, (32, 16))  # for the warm-up of a trace
    a.random_input_len = a.random_input_len or input_len
    a.random_output_len = a.random_output_len or output_len
    a.prefix_len = (a.prefix_len or 2048) if name == "shared-prefix" else 0
    a.n = a.n or (8 if name == "n-sampling" else 1)
    a.ignore_eos = not trace if a.ignore_eos is None else a.ignore_eos
    # Some servers refuse n > 1 at temperature 0, which makes all choices the same.
    a.temperature = float(a.n > 1) if a.temperature is None else a.temperature


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


def _rates(text: str) -> list[float]:
    rates = [_positive(part) for part in text.split(",")]
    if not all(map(math.isfinite, rates)):
        raise argparse.ArgumentTypeError("the rates of a sweep must be finite")
    return rates


def _percentiles(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError("percentiles are from 0 to 100")
    return values


def _slo(text: str) -> tuple[str, float]:
    name, _, bound = text.partition(":")
    if name not in SLO_METRICS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(SLO_METRICS)}, then :MS")
    return SLO_METRICS[name], _positive(bound)
