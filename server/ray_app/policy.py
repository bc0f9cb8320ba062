"""How many engines there should be, from what they report.

`desired_replicas` is the whole policy, a pure function. `WaitPolicy` is its door for Ray Serve,
which keeps to the bounds and the delays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

FULL = 0.9
"""Share of the blocks, or of the sequences of a step, above which an engine has no room."""
SPARE = 0.6
"""Share of the target wait and of the room that must suffice for one engine less."""


class Load(NamedTuple):
    """What an engine reports, averaged over a while.

    `waiting_tokens` are those that it has to compute before all that waits has got its first token,
    and `tokens_per_second` is how fast it has lately computed such tokens, 0 if it has not.
    `kv_usage` and `seats` are the shares of its blocks and of its sequences per step that are in
    use. `preemptions` are those per second.
    """

    waiting_tokens: float
    tokens_per_second: float
    kv_usage: float
    seats: float
    preemptions: float

    @property
    def usage(self) -> float:
        """The share of its room that is in use, whichever room is scarcer."""
        return max(self.kv_usage, self.seats)

    @property
    def is_full(self) -> bool:
        """Whether something waits, or was preempted, for lack of room."""
        return self.usage > FULL and (self.preemptions > 0 or self.waiting_tokens > 0)


def desired_replicas(loads: Sequence[Load], target: int, target_wait: float) -> int:
    """Return how many engines there should be.

    `loads` are those of the engines that run, `target` is how many are wanted now, and
    `target_wait` is in seconds. Engines are added until the predicted wait for a first token, which
    is the waiting tokens over the speed of all, is at most the target; and one if all engines
    together have no room. One is removed if the others would stay below SPARE of both.
    """
    if not loads:
        return target
    count = len(loads)
    speeds = [load.tokens_per_second for load in loads if load.tokens_per_second > 0]
    speed = sum(speeds) / len(speeds) if speeds else math.inf
    seconds = sum(load.waiting_tokens for load in loads) / speed
    """Seconds that one engine would need for all that waits."""
    usage = sum(load.usage for load in loads)
    # 1. More, if what waits takes too long, or has no room.
    wanted = math.ceil(seconds / target_wait)
    if usage / count > FULL and any(load.is_full for load in loads):
        wanted = max(wanted, count + 1)
    if wanted > count:
        return max(wanted, target)
    # 2. One less, if the others are enough, and no change is under way.
    rest = count - 1
    if count == target and rest > 0:
        has_room = usage / rest < SPARE
        if has_room and seconds / rest < SPARE * target_wait:
            return rest
    return target


class WaitPolicy:
    """The policy as Ray Serve calls it, with its AutoscalingContext."""

    def __init__(self, target_wait: float) -> None:
        self._target_wait = target_wait

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, and the state to keep, which is none."""
        metrics = context.aggregated_metrics or {}
        ids = set().union(*(metrics.get(name, {}) for name in Load._fields))
        loads = [Load(*(metrics[name].get(one, 0.0) for name in Load._fields)) for one in ids]
        return desired_replicas(loads, context.target_num_replicas, self._target_wait), {}
