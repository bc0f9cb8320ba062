"""What a run on a GPU does, in order: the most informative first, each stage within its seconds.

A run may end at any time, so each stage is worth having without those after it. Needs only the
standard library.
"""

from __future__ import annotations

import re
from typing import NamedTuple

BUDGET = 545.0
"""Seconds of a whole run by default: a lent GPU may end a command after 600."""

KINDS = {
    "checks": ("gpu_checks", "cases"),
    "times": ("gpu_times", "cases"),
    "sweep-decode": ("gpu_sweep", "decode_cases"),
    "sweep-extend": ("gpu_sweep", "extend_cases"),
}
"""Kind of cases → the module and the function that return them."""


class Stage(NamedTuple):
    """A part of a run: cases of kernels by kind and name, or parts of gpu_engine.py."""

    name: str
    seconds: float
    cases: tuple[tuple[str, str], ...] = ()
    """Pairs of a kind and an expression that finds the names of the cases."""
    engine: tuple[str, ...] = ()
    """Names of stages of gpu_engine.py."""

    def picks(self, kind: str, name: str) -> bool:
        """Return whether a case is among this stage's."""
        return any(kind == one and re.search(found, name) for one, found in self.cases)


_SMOKE = (
    r"^(inputs|bfloat16 (write|rows|decode llama b16|extend llama b16|extend 20 times"
    r"|mixed steps llama|best tokens|dependent launches))"
)
STAGES = (
    Stage(
        "smoke", 30, cases=(("times", r"^limit (copy|read|matmul)"), ("checks", _SMOKE))
    ),
    Stage("llama family", 20, engine=("check llama",)),
    Stage("0.6B", 80, engine=("qwen3-0.6b",)),
    Stage("8B", 150, engine=("llama-3.1-8b",)),
    Stage("points", 70, engine=("qwen3-0.6b points",)),
    Stage(
        "kernels", 70,
        cases=(
            ("times", r"^decode llama( fp8)? (64x4096|32x1600|1x8192) b16$"),
            ("times", r"^extend llama( fp8)? 8k (b16|in order b128)$"),
            ("times", r"^write llama 4096|^rope\+write llama 4096|^sdpa"),
            ("times", r"^shared .*64x4096|^sample (whole|top_p) (1|256)x"),
            ("times", r"^product (int4|float8|dense) (1|64)x"),
            ("times", r"^experts (kernel|torch) 1 |^experts kernel 4096"),
        ),
    ),
    Stage(
        "tiles", 60,
        cases=(
            ("sweep-extend", r"^extend 8k b16 (m128 n(64|128) w8 s[23] p1|m64 n128 w4 s2 p1)"),
            ("sweep-decode", r"^decode 1x(1024|8192) b16 c"),
            ("sweep-decode", r"^decode fp8 "),
            ("sweep-decode", r"^decode 64x4096 b16 m16 n(64|128) w[48] s[34] p1"),
        ),
    ),
    Stage(
        "recurrences", 20, cases=(("checks", r"^bfloat16 states"), ("times", r"^recurrence ")),
    ),
    Stage("coverage", 60, cases=(("checks", ""),), engine=("check gemma2",)),
    Stage(
        "features", 60,
        engine=(
            "llama-3.1-8b comparisons", "qwen3-0.6b comparisons", "qwen3-0.6b generate_batch",
            "check qwen3", "check mistral",
        ),
    ),
    Stage("everything else", 15, cases=(("times", ""), ("sweep-decode", ""), ("sweep-extend", ""))),
)  # fmt: skip
