"""HTTP processes on virtual time: each is a queue in which one job is done after the other.

    request ─▶ read, check, tokenise ─▶ engine ─▶ message of a step ─▶ each output in turn ─▶ client

All jobs of a process wait for each other: a prompt that arrives waits until the outputs of a step
are written, and a first token, which comes last in its step's message, waits for the other outputs
and for the prompts that came before it.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Literal, NamedTuple

FrontSource = Literal["measured", "given", "left out"]
"""Where the times of the front come from: from the calibration; at least in part from flags; or
they are left out of the plan, because nobody knows them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontTimes:
    """What an HTTP process takes for its jobs, in seconds.

    `request` is for a request without a prompt, and `prompt_token` for each token of its prompt;
    then the request is on its way to its engine for `latency`, in which the process does other
    things. `message` is for the message of a step, and `output` for each output in it.
    """

    request: float = 0.0
    prompt_token: float = 0.0
    latency: float = 0.0
    message: float = 0.0
    output: float = 0.0

    def __add__(self, other: FrontTimes) -> FrontTimes:
        sums = [one + two for one, two in zip(astuple(self), astuple(other), strict=True)]
        return FrontTimes(**dict(zip(self.__slots__, sums, strict=True)))


class Front(NamedTuple):
    """The HTTP processes of a fleet: what each takes for its jobs, and how many there are."""

    times: FrontTimes = FrontTimes()
    workers: int = 1


class HttpProcess:
    """One process on virtual time. Its jobs must be given in the order in which they come."""

    def __init__(self) -> None:
        self.free_at = 0.0
        """When all jobs that it has got are done."""
        self.busy = 0.0
        """Seconds that its jobs took."""

    def work(self, now: float, seconds: float) -> float:
        """Do a job that comes `now`, after those before it. Returns when it is done."""
        self.free_at = max(self.free_at, now) + seconds
        self.busy += seconds
        return self.free_at
