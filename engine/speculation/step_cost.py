"""What a step costs by its number of tokens, as measured while serving."""

from __future__ import annotations

MAX_TOKENS = 64
"""Steps of more tokens are not measured: drafts do not pay there."""
_FIRST_SLOPE = 0.1
"""Cost of a further token against that of a step of one, before anything was measured."""
_FIRST_PASS = 0.2
"""Cost of a pass of the draft model against that of a step, before anything was measured."""
_PASS_MEMORY, _PASS_RECOVERY = 0.8, 0.01
"""Weight of what was known of a pass when another is measured; and the share of the way back to the
first guess that a step without one brings, so that a bad measurement does not last for ever."""
_SCALE_MEMORY, _SHAPE_MEMORY = 0.7, 0.95
_OUTLIER = 4.0
"""A step this many times slower than expected was held up by something else."""


class StepCost:
    """Relative costs of steps in which every row only decodes.

    A step's time is modelled as scale × shape[tokens]. The scale follows the length of contexts and
    the load of the machine at once; the shape, which alone decides about drafts, changes slowly.
    """

    def __init__(self) -> None:
        self._scale = 0.0
        self._pass = _FIRST_PASS
        self._shape = [1.0 + _FIRST_SLOPE * (tokens - 1) for tokens in range(MAX_TOKENS + 1)]

    def __call__(self, tokens: int) -> float:
        """Return the cost of a step of this many tokens, up to MAX_TOKENS."""
        return self._shape[tokens]

    def draft_pass(self, rows: int) -> float:
        """Return the cost of one pass of the draft model for so many rows."""
        return self._pass * self._shape[min(rows, MAX_TOKENS)]

    def forget_passes(self) -> None:
        """Go a little of the way back to the first guess. Called once a step that may draft."""
        self._pass += _PASS_RECOVERY * (_FIRST_PASS - self._pass)

    def observe_passes(self, passes: int, rows: int, seconds: float) -> None:
        """Learn that so many passes of the draft model, for `rows` rows, took `seconds`."""
        expected = self._scale * self._shape[min(rows, MAX_TOKENS)]
        if expected:
            measured = seconds / passes / expected
            measured = min(measured, _OUTLIER * max(self._pass, _FIRST_PASS))
            self._pass = _PASS_MEMORY * self._pass + (1 - _PASS_MEMORY) * measured

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn that a step of `tokens` tokens took `seconds`."""
        if not 0 < tokens <= MAX_TOKENS:
            return
        expected = self._scale * self._shape[tokens]
        if not expected:
            self._scale = seconds / self._shape[tokens]
            return
        if seconds > _OUTLIER * expected:
            self._scale *= 1.1  # unless it stays as slow as that
            return
        shape = _SHAPE_MEMORY * self._shape[tokens] + (1 - _SHAPE_MEMORY) * seconds / self._scale
        self._scale = _SCALE_MEMORY * self._scale + (1 - _SCALE_MEMORY) * (
            seconds / self._shape[tokens]
        )
        self._shape[tokens] = shape
        # More tokens never cost less: neighbours that were not measured lately give way.
        for other in range(tokens + 1, MAX_TOKENS + 1):
            if self._shape[other] >= shape:
                break
            self._shape[other] = shape
        for other in range(tokens - 1, 0, -1):
            if self._shape[other] <= shape:
                break
            self._shape[other] = shape
