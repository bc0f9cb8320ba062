"""Which grammars are at fault if the masks of a step take long.

The work of a very ambiguous grammar grows with each token that it reads, and every row of a step
waits for all masks. So after a slow step the rows are timed one by one, and grammars fail that
take more than their share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

SLOW_SECONDS = 0.05
"""Time to fill a step's rows after which the following steps time each row."""
TIMED_STEPS = 50
"""How many steps do, after a slow one."""
ROW_SECONDS = 0.01
"""CPU time for one row that is never held against a grammar."""
STEP_SECONDS, REQUEST_SECONDS = 0.25, 2.0
"""CPU time beyond which grammars fail: of all rows of a step, the slowest first, and of all rows of
one request, counting only what exceeds ROW_SECONDS."""
MESSAGE = (
    "the grammar takes too long to follow: it is so ambiguous that its work grows with each token"
)


class Account(Protocol):
    """A request's grammar, with the CPU time that its rows took beyond ROW_SECONDS each."""

    seconds: float


class Row(Protocol):
    """A row of a step."""

    @property
    def constrained(self) -> Account: ...


_Row = TypeVar("_Row", bound=Row)


def at_fault(spent: Sequence[tuple[_Row, float]]) -> Iterator[_Row]:
    """Charge rows for the CPU time that each took in this step, and yield those that must fail."""
    total = 0.0
    for row, seconds in spent:
        row.constrained.seconds += max(0.0, seconds - ROW_SECONDS)
        total += seconds
    for row, seconds in sorted(spent, key=lambda item: -item[1]):
        too_slow = seconds > ROW_SECONDS and total > STEP_SECONDS
        if too_slow or row.constrained.seconds > REQUEST_SECONDS:
            total -= seconds
            row.constrained.seconds = math.inf  # its other choices end, too
            yield row
