"""The engine alone, timed in one process: `throughput` of many requests, `latency` of one batch.

    python -P -m quire.engine.bench throughput --model DIR --load-format dummy

It needs neither HTTP nor messaging packages, so that it runs on a bare GPU box. `quire bench` runs
the same commands. Prompts are random token ids, and outputs have fixed lengths: the model's own end
of sequence does not end them.
"""

from __future__ import annotations

import argparse
import sys

from ..errors import QuireError
from .arguments import add_latency_arguments, add_throughput_arguments
from .commands import run_latency, run_throughput


def main(argv: list[str] | None = None) -> int:
    """Return 0 after a run, 1 if it failed; a wrong command line exits with 2."""
    parser = argparse.ArgumentParser(prog="quire.engine.bench", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    throughput = commands.add_parser("throughput", help="many requests at once")
    add_throughput_arguments(throughput)
    throughput.set_defaults(run=run_throughput)
    latency = commands.add_parser("latency", help="one batch, repeated")
    add_latency_arguments(latency)
    latency.set_defaults(run=run_latency)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except QuireError as error:
        print(f"quire: {error.message}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
