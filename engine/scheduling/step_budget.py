"""How much a step may take on after steps that the device had no memory for."""

from __future__ import annotations

MAX_HOLD = 1024
"""The maximum number of steps of a hold."""
CALM = 16
"""After so many times its steps without another, the next hold is half as long."""


class Hold:
    """A number of steps for which something is not tried again: twice as many each time that it
    fails again soon after."""

    def __init__(self) -> None:
        self.steps = 0
        """Steps that must still succeed."""
        self._next = 1
        self._num_calm = 0

    def begin(self, *, again: bool) -> None:
        """Begin to hold; `again` says whether the next hold should be longer."""
        self.steps = max(self.steps, self._next)
        self._num_calm = 0
        if again:
            self._next = min(2 * self._next, MAX_HOLD)

    def succeeded(self) -> None:
        """Note that a step succeeded."""
        if self.steps:
            self.steps -= 1
        elif self._next > 1:
            self._num_calm += 1
            if self._num_calm >= CALM * self._next:
                self._next //= 2
                self._num_calm = 0


class StepBudget:
    """The maximum number of tokens of a step, and whether requests may be admitted beside others.

    A step that ran out of memory halves the budget. It doubles again with every step that succeeds,
    but not during a hold. A step that was too large under the smallest budget has requests in it
    that do not fit together: then it is admission that is held. Both holds grow with each failure,
    because a failed step may undo all that its sequences had computed (states cannot be rewound):
    so each time more is computed than before, and what can run does end.
    """

    def __init__(self, max_tokens: int, smallest: int) -> None:
        """`smallest` is the number of tokens below which a step is not made smaller."""
        self.tokens = self.max_tokens = max_tokens
        self._smallest = smallest
        self._growth = Hold()
        self._admission = Hold()

    @property
    def is_smallest(self) -> bool:
        """Whether no smaller step can be tried."""
        return self.tokens <= self._smallest

    @property
    def holds_admission(self) -> bool:
        """Whether no request may be admitted beside others."""
        return self._admission.steps > 0

    def ran_out(self, step_tokens: int) -> None:
        """Note that a step of so many tokens found too little memory."""
        was_smallest = self.is_smallest
        self.tokens = max(min(self.tokens, step_tokens) // 2, self._smallest)
        self._growth.begin(again=not was_smallest)
        self._admission.begin(again=was_smallest)

    def succeeded(self) -> None:
        """Note that a step found memory enough."""
        if not self._growth.steps:
            self.tokens = min(self.tokens * 2, self.max_tokens)
        self._growth.succeeded()
        self._admission.succeeded()

    def found_culprit(self) -> None:
        """Note that a request has ended with which no step fitted."""
        self._admission = Hold()
