"""Run many requests alone and in a crowd, on every kind of body, and compare them bit for bit.

make determinism REQUESTS=10000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from .bodies import ADAPTED, COMPILED, GENERIC
from .crowd import differences

AT_A_TIME = 120
"""Requests of a crowd."""


def main() -> int:
    """Run the command line; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="in all, at least")
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    bodies = (*COMPILED, *ADAPTED, *GENERIC)
    # Tokens that are computed one at a time take long: such bodies get a quarter as many.
    shares = 4 * (len(COMPILED) + len(ADAPTED)) + len(GENERIC)
    share = -(-options.requests // (AT_A_TIME * shares))
    wrong = total = 0
    for body in bodies:
        crowds = share if body in GENERIC else 4 * share
        began, differ = time.monotonic(), 0
        with tempfile.TemporaryDirectory() as folder:
            body.save(Path(folder))
            for seed in range(options.first_seed, options.first_seed + crowds):
                found = list(differences(body, Path(folder), AT_A_TIME, seed, deterministic=True))
                differ += len(found)
                for name, expected, got in found[:3]:
                    print(f"  {body.name} {name}:\n    alone {expected}\n    crowd {got}")
        seconds = time.monotonic() - began
        count = crowds * AT_A_TIME
        print(f"{count:>7,} requests  {differ} differ  {seconds:>5.0f} s  {body.name}", flush=True)
        wrong += differ
        total += count
    print(f"{total:>7,} requests in all, {wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
