"""Run many seeds of the simulation in parallel and print what came of them.

    make simulate SEEDS=1000

Exits with code 1 if any seed violates what quire promises. `--seeds 1 --first N` repeats one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable

from .world import Report, run_seed


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    return parser.parse_args()


def _table(title: str, counts: Counter[str]) -> None:
    print(f"\n{title}")
    for name, number in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        print(f"  {number:>12,}  {name}")


def summarise(reports: Iterable[Report], num_seeds: int) -> int:
    """Print a summary of the reports as they come; return the number of violations."""
    total: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    longest = 0.0
    violations = 0
    for number, report in enumerate(reports, 1):
        total += Counter(
            seeds=1, steps=report.steps, requests=report.requests, choices=report.choices
        )
        outcomes += report.outcomes
        faults += report.faults
        counts += report.counts
        longest = max(longest, report.longest_wait)
        if report.violation is not None:
            violations += 1
            print(f"seed {report.seed}: {report.violation}", flush=True)
        if number % 100 == 0:
            print(f"{number}/{num_seeds} seeds, {total['steps']:,} steps", flush=True)
    _table("ran", total)
    _table("outcomes of requests", outcomes)
    _table("faults and disturbances", faults)
    _table("what happened in the engines", counts)
    print(f"\nlongest wait for a first step: {longest:.0%} of its bound")
    print(f"requests lost, blocks leaked, tokens that differ, other violations: {violations}")
    return violations


def main() -> int:
    """Run the seeds of the command line."""
    options = _parse()
    began = time.monotonic()
    seeds = range(options.first, options.first + options.seeds)
    with multiprocessing.Pool(options.processes) as pool:
        violations = summarise(pool.imap_unordered(run_seed, seeds, chunksize=4), len(seeds))
    print(f"{time.monotonic() - began:.0f} s in {options.processes} processes")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
