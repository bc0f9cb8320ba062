"""Run many requests alone and in a crowd, on every kind of body, and compare them bit for bit.

make determinism REQUESTS=10000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path

from .bodies import ADAPTED, COMPILED, GENERIC
from .crowd import differences

AT_A_TIME = 100
"""Requests of a crowd."""


def main() -> int:
    """Run the command line; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="in all, at least")
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    bodies = (*COMPILED, *ADAPTED, *GENERIC)
    # Tokens that are computed one at a time take long: such bodies get a quarter as many.
    crowds = [body for turn in range(4) for body in bodies if body not in GENERIC or turn == 0]
    counts: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as parent:
        folders = {body.name: Path(parent) / str(number) for number, body in enumerate(bodies)}
        for body in bodies:
            body.save(folders[body.name])
        for number in count():
            body = crowds[number % len(crowds)]
            seed = options.first_seed + number
            for name, expected, got in differences(
                body, folders[body.name], AT_A_TIME, seed, deterministic=True
            ):
                wrong[body.name] += 1
                print(f"  {body.name} {name}:\n    alone {expected}\n    crowd {got}")
            counts[body.name] += AT_A_TIME
            print(f"{counts.total():,} requests, {wrong.total()} differ: {body.name}", flush=True)
            if counts.total() >= options.requests:
                break
    for body in bodies:
        print(f"{counts[body.name]:>7,} requests  {wrong[body.name]} differ  {body.name}")
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
