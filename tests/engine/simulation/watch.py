"""What is checked of the order in which requests start: first come first served, and no starvation.

The bound on a request's wait is in steps that compute something or find nothing running. In each of
the former the first running sequence computes at least one token, and it is never preempted for
another. So a request starts after at most as many steps as there are tokens (prompts and answers of
all choices) in the requests that were unfinished when it came, or that came later and passed it.
Nobody passes by the policy fcfs, and by the policy priority only whoever has a better rank; how
many pass by the policy fair is tested with its queue. Twice the bound is allowed, since sequences
sit out the steps in which siblings fork and beams wait for each other, and SLACK more for the ends
of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from quire.engine.request import Request
from quire.engine.scheduling.ranked_queue import SECONDS_PER_PRIORITY
from quire.engine.scheduling.scheduler import Scheduler

SLACK = 32
"""Steps of a wait that no other request accounts for."""


def work(request: Request) -> int:
    """Return the number of tokens of a request's prompt and of all its answers."""
    params = request.sampling_params
    return len(request.prompt_token_ids) + (params.beam_width or params.n) * params.max_tokens


@dataclass
class _Waiting:
    request: Request
    order: tuple[int, int]
    since: int
    """Productive steps before it came."""
    ahead: int
    """Tokens of the requests that go before it."""


class Watch:
    """Follows the requests of one engine from their arrival to their first step."""

    def __init__(
        self,
        scheduler: Scheduler,
        policy: str,
        is_ready: Callable[[Request], bool],
        has_left: Callable[[str], bool],
    ) -> None:
        """`has_left` says of a request whether its client left so long ago that the engine must
        know."""
        self._scheduler = scheduler
        self._policy = policy
        self._is_ready = is_ready
        self._has_left = has_left
        self._waiting: dict[str, _Waiting] = {}
        self._unfinished: dict[str, Request] = {}
        self._steps = 0
        self._numbers = count()
        self.longest = 0.0
        """The longest wait so far, as a share of its bound."""

    def added(self, request: Request) -> None:
        self._forget_ended()
        ahead = sum(work(other) for other in self._unfinished.values())
        self._unfinished[request.request_id] = request
        priority = 0
        if self._policy == "priority":
            priority = request.priority * SECONDS_PER_PRIORITY + int(request.arrival_time)
        order = (priority, next(self._numbers))
        self._waiting[request.request_id] = _Waiting(request, order, self._steps, ahead)

    def stepped(self, *, is_productive: bool, is_held: bool) -> None:
        """Follow a step; `is_productive` says whether it computed anything, and `is_held` that none
        may be admitted, since the device had too little memory lately."""
        plan = self._scheduler.last_plan
        assert plan is not None
        for sequence in plan.rows:
            entry = self._waiting.pop(sequence.request.request_id, None)
            if entry is not None:
                self._forget_ended()
                self._check(entry)
        for waiting in self._waiting.values():
            if waiting.request.grammar is not None and not self._is_ready(waiting.request):
                waiting.since = self._steps
        if not is_held:
            self._steps += is_productive or not self._scheduler.running

    def _check(self, entry: _Waiting) -> None:
        name = entry.request.request_id
        assert not self._has_left(name), f"{name} starts, but its client has left"
        waited, bound = self._steps - entry.since, 2 * entry.ahead + SLACK
        assert waited <= bound, f"{name} waited {waited} steps, over {bound}"
        self.longest = max(self.longest, waited / bound)
        for other in self._waiting.values():
            if other.order[1] < entry.order[1]:  # a request that came earlier was passed
                other.ahead += work(entry.request)
            in_order = self._policy == "fair" or entry.order < other.order
            if not in_order and other.request.adapter is None:
                assert not self._is_ready(other.request), (
                    f"{name} went before {other.request.request_id}"
                )

    def _forget_ended(self) -> None:
        find = self._scheduler.requests.find
        for table in (self._unfinished, self._waiting):
            for request_id in [one for one in table if not find(one)]:
                del table[request_id]  # type: ignore[attr-defined]
