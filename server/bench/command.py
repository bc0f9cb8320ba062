"""`quire bench`: measures any OpenAI-compatible server, or the engine alone."""

from __future__ import annotations

import argparse
import resource
import sys
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from ...engine.bench.arguments import add_latency_arguments, add_throughput_arguments
from ...engine.bench.commands import run_latency, run_throughput
from ...engine.errors import QuireError, StartupError
from ..about import install_extra
from .arguments import add_serve_arguments, check_arguments
from .plot import write_plot


def add_parser(commands: Any) -> None:
    """Add `bench` with its three commands, each of which sets `run(arguments) -> exit code`."""
    bench = commands.add_parser(
        "bench",
        help="measure a server or the engine alone",
        description="Measure a server or the engine alone.",
        allow_abbrev=False,
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
        "throughput", help="many requests at once, in the engine alone", allow_abbrev=False
    )
    add_throughput_arguments(throughput, demo)
    throughput.set_defaults(run=run_throughput)
    latency = kinds.add_parser(
        "latency", help="one batch, repeated, in the engine alone", allow_abbrev=False
    )
    add_latency_arguments(latency, demo)
    latency.set_defaults(run=run_latency)


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code.

    The code is 0, or 1 with one line of text if the command failed, or 130 if it was interrupted.
    """
    try:
        return int(arguments.run(arguments))
    except QuireError as error:
        print(f"quire: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run_serve(arguments: argparse.Namespace) -> int:
    """Measure a server and write the files asked for.

    Returns 0 if any request completed, and 1 otherwise. Raises StartupError if the server does not
    answer or aiohttp is not installed.
    """
    check_arguments(arguments)
    try:
        from .measure import measure
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise StartupError(f"this command needs aiohttp: {install_extra('bench')}") from error

    # Every running request has a socket; above the usual limit of 1024 they would fail.
    _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))
    result, last = uvloop.run(measure(arguments))
    if arguments.save_result or arguments.result_filename:
        path = arguments.result_filename or Path(f"bench-{datetime.now():%Y%m%d-%H%M%S}.json")
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
        print(f"result: {path}")
    if arguments.plot:
        write_plot(arguments.plot, result, last)
        print(f"plot: {arguments.plot}")
    return 0 if any(run.completed for run in result.runs) else 1
